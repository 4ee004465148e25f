"""A generated data set of real H.264 files with eight classes that differ only in motion.

A bright textured sprite on a plain dark background moves left, right, up or down, rotates, grows or shrinks. Position,
angle and size are periodic (the sprite leaves the frame at one border and enters at the opposite one; after the largest
size comes the smallest) and start uniformly at random in every class, so no single frame reveals the class.

    python -m mvd.data.synthetic_motion FOLDER
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from tqdm import tqdm

from mvd.config import ConfigError

CLASSES = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink")
FRAMES = 24
HEIGHT, WIDTH = 48, 56
SMALLEST, LARGEST = 9, 24  # sides of the sprite, in pixels
# Range of the speeds of x, y, angle and size, in periods per frame.
SPEEDS = ((2.6 / WIDTH, 3.8 / WIDTH), (2.6 / HEIGHT, 3.8 / HEIGHT), (16 / 360, 26 / 360), (0.06, 0.09))
SPRITE = 32  # side of the texture in pixels, before it is scaled into a frame
MANIFEST, UNFINISHED = "motion.json", "motion.unfinished.json"


class Poses(NamedTuple):
    """The sprite in each frame, (frames,) each: centre in pixels, angle in degrees clockwise, side in pixels."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    side: np.ndarray


def draw_poses(label: int, rng: np.random.Generator, frames: int = FRAMES) -> Poses:
    """Draw a clip's poses: one quantity, given by the class, changes; the other three stay constant."""
    starts = rng.uniform(size=4)
    speeds = np.zeros(4)
    moving = label // 2
    forward = CLASSES[label] in ("right", "down", "clockwise", "grow")
    speeds[moving] = rng.uniform(*SPEEDS[moving]) * (1 if forward else -1)
    x, y, angle, size = (starts[:, None] + speeds[:, None] * np.arange(frames)) % 1
    return Poses(x * WIDTH, y * HEIGHT, angle * 360, SMALLEST * (LARGEST / SMALLEST) ** size)


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """Render one clip of a class: uint8 (FRAMES, HEIGHT, WIDTH, 3), RGB."""
    poses = draw_poses(label, rng)
    background = rng.integers(0, 64, 3)
    pattern = rng.integers(96, 256, (3, 3, 3)).astype(np.uint8)
    texture = cv2.resize(pattern, (SPRITE, SPRITE), interpolation=cv2.INTER_NEAREST)
    opaque = np.ones((SPRITE, SPRITE), np.float32)
    centre = (SPRITE - 1) / 2
    clip = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for frame, x, y, angle, side in zip(clip, *poses, strict=True):
        # Rendered at the centre and rolled into position, which wraps around the frame's borders.
        matrix = cv2.getRotationMatrix2D((centre, centre), -angle, side / SPRITE)
        matrix[:, 2] += (WIDTH // 2 + x % 1 - centre, HEIGHT // 2 + y % 1 - centre)
        sprite = cv2.warpAffine(texture, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        cover = cv2.warpAffine(opaque, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)[..., None]
        rendered = np.rint(background * (1 - cover) + sprite)
        frame[:] = np.roll(rendered, (int(y) - HEIGHT // 2, int(x) - WIDTH // 2), axis=(0, 1))
    return clip


def write_video(path: Path, clip: np.ndarray, fps: int = 12) -> None:
    """Write uint8 (T, H, W, 3) as H.264 in .mp4, atomically through a rename."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    # The lookahead of slower presets makes x264's output differ between runs.
    options = {"crf": "18", "preset": "ultrafast", "threads": "1"}
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in clip:
            # Converted by OpenCV, because PyAV's own conversion differs between runs.
            planes = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    unfinished.rename(path)


def generate_motion(root: str | Path, train: int = 2400, val: int = 320, seed: int = 0) -> Path:
    """Write the data set: train/ and val/ videos, train.csv, val.csv and test.csv (the same videos as val.csv).

    A complete folder is left unchanged; an interrupted one is completed. Returns the folder.

    Raises:
        ConfigError: the folder holds anything else.
    """
    root = Path(root)
    settings = {"version": 5, "train": train, "val": val, "seed": seed}
    if _settings_of(root) == settings and (root / MANIFEST).exists():
        return root
    if _settings_of(root) != settings and root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} holds other files than the motion data set {settings}; give another folder")
    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).write_text(json.dumps(settings))
    splits = {"train": train, "val": val}
    tasks = [(root, split, i, seed) for split, count in splits.items() for i in range(count)]
    for split in splits:
        (root / split).mkdir(exist_ok=True)
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        done = pool.map(_write_one, tasks, chunksize=16)
        lines = list(tqdm(done, total=len(tasks), desc="motion data set", unit="video", leave=False, mininterval=1))
    (root / "train.csv").write_text("".join(lines[:train]))
    for name in ("val.csv", "test.csv"):
        (root / name).write_text("".join(lines[train:]))
    (root / UNFINISHED).rename(root / MANIFEST)
    return root


def _settings_of(root: Path) -> dict[str, int] | None:
    for name in (MANIFEST, UNFINISHED):
        if (root / name).exists():
            settings: dict[str, int] = json.loads((root / name).read_text())
            return settings
    return None


def _write_one(task: tuple[Path, str, int, int]) -> str:
    """Write one video unless it exists, and return its annotation line."""
    root, split, number, seed = task
    label = number % len(CLASSES)
    name = f"{split}/{number:05d}.mp4"
    if not (root / name).exists():
        rng = np.random.default_rng([seed, ("train", "val").index(split), number])
        write_video(root / name, render(label, rng))
    return f"{name} {label}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the motion data set.")
    parser.add_argument("root", help="folder to write to")
    parser.add_argument("--train", type=int, default=2400, help="training videos (default: %(default)s)")
    parser.add_argument("--val", type=int, default=320, help="validation videos (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(generate_motion(arguments.root, arguments.train, arguments.val, arguments.seed))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
