"""Whether a container's timestamps tell the order in which the frames are shown."""

from collections.abc import Sequence
from heapq import heappush, heapreplace
from itertools import pairwise

from mvd.data.video.container import Track

INVENTED = ("avi", "asf")  # they store no times of presentation; FFmpeg fills them in
HIDING = ("vp8", "vp9", "av1")  # codecs with frames that are never shown, which AVI gives a time of their own
PACKED = ("mpeg4",)  # XviD and DivX may pack two frames into one packet, which moves all later timestamps


def are_doubtful(track: Track, depth: int) -> bool:
    """Whether some timestamps may be wrong, as told by the packets alone.

    depth: by how many frames the decoder reorders. A doubt may be wrong: only decoding tells.
    """
    times = [packet.pts for packet in track.packets if packet.pts is not None]
    if len(set(times)) < len(track.packets):
        return True
    if track.container in INVENTED and (depth > 0 or track.codec in HIDING):
        return True
    if track.codec == "vp8" and not all(memoryview(packet)[0] & 16 for packet in track.packets):
        return True  # the bit is show_frame: a hidden frame would be counted as one
    if depth > 0 and (track.codec in PACKED or all(one < next_one for one, next_one in pairwise(times))):
        return True  # frames are reordered, but their timestamps are not
    return go_back(times, depth)


def go_back(times: Sequence[int], depth: int) -> bool:
    """Whether one of the times is earlier than more than `depth` of the times before it."""
    latest: list[int] = []  # a heap of the latest times so far
    for time in times:
        if len(latest) <= depth:
            heappush(latest, time)
        elif time < latest[0]:
            return True
        else:
            heapreplace(latest, time)
    return False
