"""Decodes a video packet by packet, and only the packets that the wanted frames depend on.

The file is read once and its compressed packets are kept. Frames are numbered by the timestamps of the packets that
are shown; nothing is ever sought in the file, which is what goes wrong on files cut with an edit list. From the
keyframe before a wanted frame on, the packets up to that frame are decoded. Of these, H.264's non-reference frames
are left out unless they are wanted: no other frame depends on them. If the timestamps may be wrong
(mvd.data.video.timestamps), the file is decoded from its start, and its frames are numbered as they come.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from mvd.data.video.container import VideoPacket, read_track
from mvd.data.video.errors import UnreadableVideo, first_line, unreadable
from mvd.data.video.orientation import AS_STORED, Orientation, orientation_of
from mvd.data.video.timestamps import are_doubtful

MAX_REORDER_DEPTH = 16  # frames, of an H.264 decoder
SLICES = range(1, 6)  # nal_unit_type of the units that hold pixels


class PacketVideo:
    """A video decoded by PyAV on one thread: loader processes are the parallelism.

    Meant for clips: the compressed file is held in memory. The display matrix is applied.

    codec: FFmpeg's name; in_decoder_order: whether frames are numbered as they come out of the decoder, because the
    timestamps are missing or wrong. Opening such a file decodes all of it. time_base: of the frames' times, in seconds.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with unreadable(path):
            track = read_track(path)
            self.codec = track.codec
            self._packets = track.packets
            self._set_decoder(track.decoder, track.decoder.reorder_depth)
            self._unit_prefix = unit_prefix(track.decoder)
            self._length, self._number_of, self.in_decoder_order = 0, dict[int, int](), False
            self._orientation = _first_orientation(track.native, track.packets) if track.native else None
            self._number_frames(are_doubtful(track, self._reorder_depth))
            self.time_base = 1 / track.rate if self.in_decoder_order else track.time_base
        if not len(self):
            raise UnreadableVideo(path, "it holds no frames")

    def _set_decoder(self, decoder: VideoCodecContext, reorder_depth: int) -> None:
        self._decoder, self._reorder_depth = decoder, reorder_depth
        self._reformatter = VideoReformatter()

    def __len__(self) -> int:
        return self._length

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """See mvd.data.video.reader.Video."""
        return np.stack(self.pictures(indices))

    def pictures(self, indices: np.ndarray) -> list[np.ndarray]:
        """See mvd.data.video.reader.Video."""
        wanted, places = np.unique(indices, return_inverse=True)
        numbers = wanted.tolist()
        if numbers[0] < 0 or numbers[-1] >= len(self):
            raise IndexError(f"{self._path} has frames 0 to {len(self) - 1}, not {numbers[0]} to {numbers[-1]}")
        with unreadable(self._path):
            decoded = self._decode(numbers)
            arrays = [self._to_rgb(decoded[number]) for number in numbers]
        if any(array.shape != arrays[0].shape for array in arrays):
            raise UnreadableVideo(self._path, "its frames are of different sizes")
        return [arrays[place] for place in places]

    def decode_all(self) -> Iterator[VideoFrame]:
        """Every frame in order, as it comes out of the decoder: neither converted nor turned upright.

        Raises:
            UnreadableVideo: one of them is damaged, or their timestamps are out of order.
        """
        last = -1
        with unreadable(self._path):
            for count, frame in enumerate(self._shown(self._packets)):
                frame.time_base = self.time_base  # the last ones come without
                if self.in_decoder_order:
                    frame.pts = count
                    yield frame
                elif (number := self._number(frame)) is not None:
                    if number <= last:
                        raise UnreadableVideo(self._path, "its timestamps are not in the order of its frames")
                    last = number
                    yield frame

    def orientation(self, frame: VideoFrame) -> Orientation:
        """How a frame of this video is shown."""
        return orientation_of(frame) if self._orientation is None else self._orientation

    def _number_frames(self, doubtful: bool) -> None:
        """Numbers the frames; doubtful timestamps count only if they are those of the decoded frames, in order."""
        times = [packet.pts for packet in self._packets if packet.pts is not None]
        if self._packets and len(times) == len(self._packets):
            keyframes = [i for i, packet in enumerate(self._packets) if packet.is_keyframe] or [0]
            self._number_packets(times, keyframes, [packet.is_discard for packet in self._packets])
        if not doubtful:
            return
        decoded = [frame.pts for frame in self._shown(self._packets)]
        self.in_decoder_order = decoded != list(self._number_of)
        self._length = len(decoded)

    def _number_packets(self, times: list[int], keyframes: list[int], discarded: Sequence[bool]) -> None:
        """Numbers the packets that are shown in the order of their timestamps, and finds where decoding can start.

        Not numbered are those that an edit list hides and those that would need a keyframe before the first one.
        """
        # The earliest time from each packet on: a keyframe that later packets are shown before is no start for them.
        earliest = list(accumulate(reversed(times), min))[::-1]
        self._starts = [i for i in keyframes if i == keyframes[0] or earliest[i] == times[i]]
        first = keyframes[0]
        shown = [i for i in range(first, len(times)) if times[i] >= times[first] and not discarded[i]]
        self._shown_packets = sorted(shown, key=times.__getitem__)
        self._number_of = {times[i]: number for number, i in enumerate(self._shown_packets)}
        self._length = len(shown)

    def _number(self, frame: VideoFrame) -> int | None:
        """A decoded frame's number, or None if the frame is hidden."""
        return None if frame.pts is None else self._number_of.get(frame.pts)

    def _decode(self, numbers: list[int]) -> dict[int, VideoFrame]:
        """The frames of these numbers, in ascending order.

        Raises:
            UnreadableVideo: some of them, or of those that they depend on, do not come out of the decoder.
        """
        if self.in_decoder_order:
            wanted, decoded = set(numbers), islice(self._shown(self._packets), numbers[-1] + 1)
            frames = {number: frame for number, frame in enumerate(decoded) if number in wanted}
            lost = wanted - frames.keys()
        else:
            frames, lost = self._pick(self._needed_packets(numbers), numbers)
            if lost:  # a frame wrongly flagged as a keyframe, or a wrong reorder depth
                self._reorder_depth = MAX_REORDER_DEPTH
                last = max(self._shown_packets[number] for number in numbers)
                frames, lost = self._pick([self._load(range(last + 1))], numbers)
        if lost:
            reason = f"{len(lost)} of its frames cannot be decoded or are out of order, the first is {min(lost)}"
            raise UnreadableVideo(self._path, reason)
        return frames

    def _pick(self, runs: Iterable[list[VideoPacket]], numbers: list[int]) -> tuple[dict[int, VideoFrame], set[int]]:
        """Decodes runs of packets, each on its own.

        Returns the frames of these numbers, and the numbers of all frames in the runs that did not come out in order.
        """
        wanted, picked, lost = set(numbers), {}, set()
        for run in runs:
            due = {self._number_of[packet.pts] for packet in run if packet.pts in self._number_of}
            last = -1
            for frame in self._shown(run):
                number = self._number(frame)
                if number is None or number <= last:
                    continue
                last = number
                due.discard(number)
                if number in wanted:
                    picked[number] = frame
            lost |= due
        return picked, lost

    def _shown(self, packets: Iterable[VideoPacket]) -> Iterator[VideoFrame]:
        """What the decoder makes of these packets, from a fresh start to its end.

        Raises:
            UnreadableVideo: one is damaged, and with it all that depends on it.
        """
        decode = self._decoder.decode
        self._decoder.flush_buffers()
        self._decoder.reorder_depth = self._reorder_depth  # else it drops frames as late if others are left out
        for packet in (*packets, None):
            try:
                decoded = decode(packet)
            except av.FFmpegError as error:
                raise UnreadableVideo(self._path, f"a frame is damaged: {first_line(error)}") from error
            for frame in decoded:
                if frame.is_corrupt:
                    raise UnreadableVideo(self._path, "a frame is damaged")
                yield frame

    def _needed_packets(self, numbers: list[int]) -> Iterator[list[VideoPacket]]:
        """For each start from which wanted frames are decoded, the packets from there to the last of them."""
        targets: dict[int, list[int]] = {}
        for number in numbers:
            target = self._shown_packets[number]
            start = self._starts[bisect_right(self._starts, target) - 1]
            targets.setdefault(start, []).append(target)
        for start, wanted in targets.items():
            run = range(start, max(wanted) + 1)
            yield self._load([i for i in run if i in wanted or not self.is_disposable(i)])

    def _load(self, numbers: Sequence[int]) -> list[VideoPacket]:
        """The packets of these numbers, in the order of decoding."""
        return [self._packets[number] for number in numbers]

    def is_disposable(self, number: int) -> bool:
        """Whether no other frame depends on this one, as far as that is known: H.264 says so in each slice's header."""
        packet = self._packets[number]
        return packet.is_disposable or (self._unit_prefix > 0 and not is_reference(packet, self._unit_prefix))

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3) in the memory of a converted frame."""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        pixels = np.ndarray((rgb.height, rgb.width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))
        orientation = self.orientation(frame)
        return pixels if orientation == AS_STORED else np.ascontiguousarray(orientation.apply(pixels))


def _first_orientation(native: VideoCodecContext, packets: list[VideoPacket]) -> Orientation | None:
    """From the first frame of FFmpeg's own decoder: frames of another one come without the display matrix."""
    frames = (frame for packet in packets for frame in native.decode(packet))
    return next((orientation_of(frame) for frame in frames), None)


def unit_prefix(decoder: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 packet in an .mp4; 0 for other codecs and packings."""
    header = decoder.extradata
    return header[4] % 4 + 1 if decoder.name == "h264" and header and header[0] == 1 else 0


def is_reference(packet: VideoPacket, prefix: int) -> bool:
    """Whether other frames may depend on an H.264 packet: whether any of its slices has a nal_ref_idc above 0."""
    data = memoryview(packet)
    position = 0
    while position + prefix < len(data):
        header = data[position + prefix]
        if header & 31 in SLICES and header & 96:
            return True
        position += prefix + int.from_bytes(data[position : position + prefix])
    return False
