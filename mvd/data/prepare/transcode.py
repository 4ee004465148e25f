"""Checks one video file by decoding all of it, and writes a smaller copy that is quick to decode."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from mvd.data.video.container import VideoPacket, read_track
from mvd.data.video.errors import UnreadableVideo, first_line, is_temporary, unreadable
from mvd.data.video.orientation import AS_STORED
from mvd.data.video.packets import PacketVideo
from mvd.files import sha256, write_atomically

# Decodes more than twice as fast as x264's defaults, for a third more bytes (benchmarks/README.md).
FAST_TO_DECODE = {"tune": "fastdecode", "bf": "3", "g": "48", "x264-params": "b-pyramid=none:threads=1"}


class Facts(NamedTuple):
    """A video's properties.

    seconds: duration; width and height: as it is shown, in pixels; bytes: file size; order: how its frames are
    numbered, by their "timestamps" or, because those are missing or wrong, as they come out of the "decoder".
    """

    frames: int
    seconds: float
    width: int
    height: int
    codec: str
    bytes: int
    sha256: str
    order: str


def check_video(path: Path) -> Facts:
    """Decodes every frame.

    Raises:
        UnreadableVideo: a frame is damaged or missing, or reading the file would fail for another reason.
    """
    video = PacketVideo(str(path))
    if video.codec == "vp8":
        _compare_decoders(str(path))
    sizes, times = set(), []
    with unreadable(str(path)):
        for frame in video.decode_all():
            sizes.add(video.orientation(frame).size(frame))
            times.append(float(frame.time or 0))
    if len(sizes) > 1:
        raise UnreadableVideo(str(path), "its frames are of different sizes")
    if len(times) != len(video):
        raise UnreadableVideo(str(path), f"{len(times)} of its {len(video)} frames come out of the decoder")
    spacing = (max(times) - min(times)) / (len(times) - 1) if len(times) > 1 else 0.0
    seconds = round(max(times) - min(times) + spacing, 3)
    order = "decoder" if video.in_decoder_order else "timestamps"
    with unreadable(str(path)):
        return Facts(len(times), seconds, *sizes.pop(), video.codec, path.stat().st_size, sha256(path), order)


def _compare_decoders(path: str) -> None:
    """Compares FFmpeg's VP8 decoder with libvpx: neither reports damage, but often they decode it differently."""
    with unreadable(path):
        track = read_track(path)
        other = av.CodecContext.create("libvpx", "r")
        for one, two in zip_longest(_pictures(track.decoder, track.packets), _pictures(other, track.packets)):
            if one != two:
                raise UnreadableVideo(path, "a frame is damaged: two decoders disagree on it")


def _pictures(decoder: VideoCodecContext, packets: list[VideoPacket]) -> Iterator[bytes]:
    for packet in (*packets, None):
        for frame in decoder.decode(packet):
            visible = frame.reformat(format="yuv420p") if frame.format.name == "yuva420p" else frame
            yield visible.to_ndarray().tobytes()


def reencode(source: Path, target: Path, short_side: int) -> None:
    """Writes a video's pictures as H.264 in .mp4, upright and in order, without sound.

    short_side: in pixels; a larger picture is shrunk to it, a smaller one is left as it is.

    Raises:
        UnreadableVideo: the source cannot be decoded, or the target cannot be encoded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(target, lambda unfinished: _encode(PacketVideo(str(source)), unfinished, short_side))
    except av.FFmpegError as error:
        reason = f"it cannot be re-encoded: {first_line(error)}"
        raise UnreadableVideo(str(source), reason, is_temporary(error)) from error


def _encode(video: PacketVideo, target: Path, short_side: int) -> None:
    with av.open(str(target), "w", format="mp4") as container:
        stream, first = None, 0
        for frame in video.decode_all():
            upright = _upright(video, frame)
            if stream is None:
                stream = container.add_stream("libx264", rate=25, options=FAST_TO_DECODE)
                scale = min(1.0, short_side / min(upright.width, upright.height))
                stream.width, stream.height = (2 * round(side * scale / 2) for side in (upright.width, upright.height))
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = video.time_base
                first = frame.pts or 0  # negative times do not fit into .mp4
            # The file says nothing of its colours, which readers take for these.
            small = upright.reformat(
                stream.width,
                stream.height,
                "yuv420p",
                dst_colorspace="ITU601",
                dst_color_range="MPEG",
                interpolation="BICUBIC",
                threads=1,
            )
            small.pts, small.time_base = (frame.pts or 0) - first, video.time_base
            container.mux(stream.encode(small))
        if stream is not None:
            container.mux(stream.encode())


def _upright(video: PacketVideo, frame: VideoFrame) -> VideoFrame:
    orientation = video.orientation(frame)
    if orientation == AS_STORED:
        return frame
    turned: np.ndarray = orientation.apply(frame.to_ndarray(format="rgb24"))
    return VideoFrame.from_ndarray(np.ascontiguousarray(turned, dtype=np.uint8), format="rgb24")
