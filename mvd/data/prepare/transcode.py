"""Checks one video file by decoding all of it, and writes a smaller copy that is quick to decode."""

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import VideoFrame

from mvd.data.video.errors import UnreadableVideo, first_line
from mvd.data.video.packets import PacketVideo
from mvd.files import sha256, write_atomically

# Decodes more than twice as fast as x264's defaults, for a third more bytes (benchmarks/README.md).
FAST_TO_DECODE = {"tune": "fastdecode", "bf": "3", "g": "48", "x264-params": "b-pyramid=none:threads=1"}


class Facts(NamedTuple):
    """What a video is: frames, duration, picture size after rotation, codec, file size and SHA-256."""

    frames: int
    seconds: float
    width: int
    height: int
    codec: str
    bytes: int
    sha256: str


def check_video(path: Path) -> Facts:
    """Decodes every frame.

    Raises:
        UnreadableVideo: a frame that is damaged or missing, or anything else that reading it would stumble over.
    """
    video = PacketVideo(str(path))
    count, shape, times = 0, None, []
    for frame in video.decode_all():
        size = (frame.width, frame.height) if frame.rotation % 180 == 0 else (frame.height, frame.width)
        if shape is not None and size != shape:
            raise UnreadableVideo(str(path), "its frames are of different sizes")
        count, shape = count + 1, size
        times.append(frame.time)
    if count != len(video) or shape is None:
        raise UnreadableVideo(str(path), f"it promises {len(video)} frames and holds {count}")
    spacing = (max(times) - min(times)) / (count - 1) if count > 1 else 0.0
    seconds = max(times) - min(times) + spacing
    return Facts(count, round(seconds, 3), *shape, video.codec, path.stat().st_size, sha256(path))


def reencode(source: Path, target: Path, short_side: int) -> None:
    """Writes a video's pictures as H.264 in .mp4, upright, shrunk to a short side where it is longer, without sound.

    Raises:
        UnreadableVideo: the source cannot be decoded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(target, lambda unfinished: _encode(PacketVideo(str(source)), unfinished, short_side))
    except av.FFmpegError as error:
        raise UnreadableVideo(str(source), f"it cannot be encoded again: {first_line(error)}") from error


def _encode(video: PacketVideo, target: Path, short_side: int) -> None:
    with av.open(str(target), "w", format="mp4") as container:
        stream = None
        for frame in video.decode_all():
            upright = _upright(frame)
            if stream is None:
                stream = container.add_stream("libx264", rate=25, options=FAST_TO_DECODE)
                scale = min(1.0, short_side / min(upright.width, upright.height))
                stream.width, stream.height = (2 * round(side * scale / 2) for side in (upright.width, upright.height))
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = frame.time_base
            small = upright.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC", threads=1)
            small.pts, small.time_base = frame.pts, frame.time_base
            container.mux(stream.encode(small))
        if stream is not None:
            container.mux(stream.encode())


def _upright(frame: VideoFrame) -> VideoFrame:
    if frame.rotation == 0:
        return frame
    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return VideoFrame.from_ndarray(np.ascontiguousarray(turned), format="rgb24")
