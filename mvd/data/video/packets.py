"""Decodes a video packet by packet, and only the packets that the wanted frames depend on.

The file is read once and its compressed packets are kept. Frames are numbered by the timestamps of the packets that
are shown; nothing is ever sought in the file, which is what goes wrong on files cut with an edit list. From the
keyframe before a wanted frame on, the packets up to that frame are decoded. Of these, H.264's non-reference frames
are left out where nobody asked for them: no other frame depends on them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import accumulate

import av
import numpy as np
from av.packet import Packet
from av.stream import Discard
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from mvd.data.video.errors import UnreadableVideo, first_line

MOST_HELD_BACK = 16  # frames, by an H.264 decoder, to put them in order
SLICES = range(1, 6)  # nal_unit_type of the units that hold pixels


class PacketVideo:
    """A video decoded by PyAV on one thread: loader processes are the parallelism.

    Meant for clips: the compressed file is held in memory. A rotation flag is applied. A file without timestamps is
    decoded from its start and counted.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._packets = self._read_packets()
            self._number_frames()
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UnreadableVideo(path, first_line(error)) from error
        if not len(self):
            raise UnreadableVideo(path, "it holds no frames")

    def __len__(self) -> int:
        return self._length

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """See mvd.data.video.reader.Video."""
        wanted, places = np.unique(indices, return_inverse=True)
        numbers = wanted.tolist()
        if numbers[0] < 0 or numbers[-1] >= len(self):
            raise IndexError(f"{self._path} has frames 0 to {len(self) - 1}, not {numbers[0]} to {numbers[-1]}")
        try:
            decoded = self._decode(numbers)
        except av.FFmpegError as error:
            raise UnreadableVideo(self._path, first_line(error)) from error
        lost = [number for number in numbers if number not in decoded]
        if lost:
            raise UnreadableVideo(self._path, f"{len(lost)} of its frames cannot be decoded, the first is {lost[0]}")
        arrays = [self._to_rgb(decoded[number]) for number in numbers]
        if any(array.shape != arrays[0].shape for array in arrays):
            raise UnreadableVideo(self._path, "its frames are of different sizes")
        return np.stack([arrays[place] for place in places])

    def decode_all(self) -> Iterator[VideoFrame]:
        """Every frame in order, as it comes out of the decoder: neither converted nor turned upright.

        Raises:
            UnreadableVideo: one of them is damaged.
        """
        try:
            for number, frame in enumerate(self._shown(self._packets)):
                if not self._timed:
                    frame.pts, frame.time_base = number, 1 / self._rate
                    yield frame
                elif frame.pts in self._number_of:
                    frame.time_base = self._time_base  # the last ones come without
                    yield frame
        except av.FFmpegError as error:
            raise UnreadableVideo(self._path, first_line(error)) from error

    def _read_packets(self) -> list[Packet]:
        with av.open(self._path, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no video stream")
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            self._decoder = stream.codec_context
            self._decoder.thread_count = 1
            self._held_back = self._decoder.reorder_depth
            self._reformatter = VideoReformatter()
            self._unit_prefix = unit_prefix(self._decoder)
            self._time_base, self._rate = stream.time_base, stream.average_rate or Fraction(25)
            self.codec = self._decoder.name
            return [packet for packet in container.demux(stream) if packet.size]

    def _number_frames(self) -> None:
        """Numbers the packets that are shown in the order of their timestamps, and finds where decoding can start.

        Not numbered are those that an edit list hides and those that would need a keyframe before the first one.
        """
        packets = self._packets
        times = [packet.pts for packet in packets]
        self._timed = None not in times and len(set(times)) == len(times) > 0
        if not self._timed:
            self._length = sum(1 for _ in self._shown(packets))
            return
        keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
        # The earliest time from each packet on: a keyframe that later packets are shown before is no start for them.
        earliest = list(accumulate(reversed(times), min))[::-1]
        self._starts = [i for i in keyframes if i == keyframes[0] or earliest[i] == times[i]]
        shown = range(keyframes[0], len(packets))
        shown = [i for i in shown if times[i] >= times[keyframes[0]] and not packets[i].is_discard]
        self._shown_packets = sorted(shown, key=times.__getitem__)
        self._number_of = {times[i]: number for number, i in enumerate(self._shown_packets)}
        self._length = len(shown)

    def _decode(self, numbers: list[int]) -> dict[int, VideoFrame]:
        """The frames of these numbers, less those that do not come out of the decoder."""
        if not self._timed:
            wanted = set(numbers)
            return {number: frame for number, frame in enumerate(self._shown(self._packets)) if number in wanted}
        decoded = self._pick(self._needed_packets(numbers), numbers)
        if len(decoded) < len(numbers):  # a keyframe that is none, say, or a wrong depth
            self._held_back = MOST_HELD_BACK
            decoded = self._pick([self._packets], numbers)
        return decoded

    def _pick(self, runs: Iterable[Iterable[Packet]], numbers: list[int]) -> dict[int, VideoFrame]:
        """Decodes runs of packets, each on its own; keeps the frames of these numbers."""
        wanted = set(numbers)
        frames = (frame for run in runs for frame in self._shown(run))
        return {number: frame for frame in frames if (number := self._number_of.get(frame.pts)) in wanted}

    def _shown(self, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        """What the decoder makes of these packets, from a fresh start to its end.

        Raises:
            UnreadableVideo: one is damaged, and with it all that depends on it.
        """
        decode = self._decoder.decode
        self._decoder.flush_buffers()
        self._decoder.reorder_depth = self._held_back  # else, with frames left out, it gives some up as late
        for packet in (*packets, None):
            for frame in decode(packet):
                if frame.is_corrupt:
                    raise UnreadableVideo(self._path, "a frame is damaged")
                yield frame

    def _needed_packets(self, numbers: list[int]) -> Iterator[list[Packet]]:
        """For each start from which wanted frames are decoded, the packets from there to the last of them."""
        targets: dict[int, list[int]] = {}
        for number in numbers:
            target = self._shown_packets[number]
            start = self._starts[bisect_right(self._starts, target) - 1]
            targets.setdefault(start, []).append(target)
        for start, wanted in targets.items():
            run = ((i, self._packets[i]) for i in range(start, max(wanted) + 1))
            yield [packet for i, packet in run if i in wanted or not self._is_disposable(packet)]

    def _is_disposable(self, packet: Packet) -> bool:
        """Whether no other frame depends on this one, as far as that is known: H.264 says so in each slice's header."""
        return packet.is_disposable or (self._unit_prefix > 0 and not is_reference(packet, self._unit_prefix))

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3) in the memory of a converted frame."""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        pixels = np.ndarray((rgb.height, rgb.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        return np.rot90(pixels, round(frame.rotation / 90))


def unit_prefix(decoder: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 packet in an .mp4; 0 for other codecs and packings."""
    header = decoder.extradata
    return header[4] % 4 + 1 if decoder.name == "h264" and header and header[0] == 1 else 0


def is_reference(packet: Packet, prefix: int) -> bool:
    """Whether other frames may depend on an H.264 packet: whether any of its slices has a nal_ref_idc above 0."""
    data = memoryview(packet)
    position = 0
    while position + prefix < len(data):
        header = data[position + prefix]
        if header & 31 in SLICES and header & 96:
            return True
        position += prefix + int.from_bytes(data[position : position + prefix])
    return False
