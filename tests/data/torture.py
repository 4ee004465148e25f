"""Video files that are hard to read, written with PyAV."""

import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

RATE = 25


def moving_picture(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3): a blurred noise that drifts, with grain in each frame, so that no two frames are alike."""
    rng = np.random.default_rng(seed)
    canvas = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (2 * width, 2 * height))
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t, frame in enumerate(clip):
        left, top = t * 2 % width, t % height
        grain = rng.integers(-12, 13, (height, width, 1))
        frame[:] = np.clip(canvas[top : top + height, left : left + width].astype(int) + grain, 0, 255)
    return clip


def write(
    path: Path,
    clip: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """Encodes a clip; `times` are the frames' timestamps in 1/1000 s, by default evenly spaced."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt, threads=1)
            frame.pts = times[number] if times is not None else number * 1000 // RATE
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_from(source: Path, path: Path, seconds: float) -> Path:
    """Copies a file's packets from the keyframe before a moment on, as `ffmpeg -ss ... -c copy` does.

    In an .mp4, an edit list hides what comes before the moment.
    """
    with av.open(str(source)) as given, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        start = round(seconds / stream.time_base)
        given.seek(start, stream=stream)
        for packet in given.demux(stream):
            if packet.size:
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
                packet.stream = copy
                made.mux(packet)
    return path


def rotate(source: Path, path: Path, quarter_turns: int) -> Path:
    """Copies an .mp4 with a flag in its track header that tells players to turn it clockwise."""
    data = bytearray(source.read_bytes())
    matrix = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}[quarter_turns]
    place = data.index(b"tkhd") + 44  # version 0: flags, times, id, duration, layer and volume come before
    fixed = [value << 16 for value in matrix]
    struct.pack_into(">9i", data, place, *fixed[:2], 0, *fixed[2:], 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def damaged(damage: str, source: Path, path: Path) -> Path:
    """Writes a file that cannot be decoded, or only in part."""
    data = bytearray(source.read_bytes())
    if damage == "slice":
        with av.open(str(source)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        middle = max(packets[20:40], key=lambda packet: packet.size)
        at = middle.pos + middle.size // 2
        data[at : at + 40] = np.random.default_rng(1).bytes(40)
        path.write_bytes(data)
    elif damage == "half_a_file":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "text":
        path.write_text("not a video\n" * 1000)
    elif damage == "empty":
        path.touch()
    elif damage == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    return path


ENCODINGS: dict[str, dict[str, str]] = {
    "b_frames.mp4": {},
    "gop_12.mp4": {"g": "12"},
    "gop_250.mp4": {"g": "250", "sc_threshold": "0"},
    "intra.mp4": {"g": "1"},
    "open_gop.mp4": {"x264-params": "open-gop=1:keyint=12:bframes=3"},
    "intra_refresh.mp4": {"x264-params": "intra-refresh=1:keyint=20"},
    "fast_to_decode.mp4": {"tune": "fastdecode", "g": "48", "bf": "3", "x264-params": "b-pyramid=none"},
    "transport_stream.ts": {"g": "12"},
    "vp9.webm": {"cpu-used": "8", "deadline": "realtime", "g": "24"},
    "vp9_hidden_frames.webm": {"cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1"},
    "no_timestamps.avi": {"bf": "2"},
}
CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4"}
OTHERS = ("irregular_times", "odd_size_vp9", "odd_size", "cropped", "one_frame", "two_frames")
COPIES = {"edit_list": ("b_frames", 0.5), "edit_list_gop_12": ("gop_12", 0.7), "open_start": ("open_gop", 1.0)}
NAMES = (*(Path(name).stem for name in ENCODINGS), *OTHERS, *COPIES)


def write_all(folder: Path) -> None:
    """Writes all files that can be read, each under its name."""
    clip = moving_picture(60, 48, 64)
    for name, options in ENCODINGS.items():
        write(folder / name, clip, CODECS.get(Path(name).suffix, "libx264"), **options)
    fast = {"cpu-used": "8", "deadline": "realtime"}
    irregular = np.cumsum([40, 20, 100, 7, 33] * 12).tolist()
    odd = moving_picture(20, 37, 51)
    write(folder / "irregular_times.mp4", clip, times=irregular)
    write(folder / "odd_size_vp9.webm", odd, "libvpx-vp9", **fast)
    write(folder / "odd_size.mp4", odd, pix_fmt="yuv444p")
    write(folder / "cropped.mp4", moving_picture(20, 50, 54))
    write(folder / "one_frame.mp4", clip[:1])
    write(folder / "two_frames.mp4", clip[:2])
    for name, (source, seconds) in COPIES.items():
        copy_from(folder / f"{source}.mp4", folder / f"{name}.mp4", seconds)


if __name__ == "__main__":  # a process of its own: once decord is loaded, PyAV's VP9 encoder finds another libvpx
    write_all(Path(sys.argv[1]))
