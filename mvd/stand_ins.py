"""Random weights and generated samples, with which a stage is rehearsed before the real ones exist (mvd.rehearsal)."""

import os
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from mvd.config import Recipe, dataset_of
from mvd.data.synthetic_motion import CLASSES, render, write_video
from mvd.files import write_atomically
from mvd.models import build_classifier, build_image_teacher, build_video_teacher
from mvd.models.checkpoints import to_official

# As a video of Kinetics-400, 10 s with a short side of 256 pixels, but with less detail, so that it decodes faster.
HEIGHT, WIDTH, FRAMES, FPS = 256, 340, 250, 25
VIDEOS = len(CLASSES)  # all others are links to these


def write_weights(role: str, recipe: Recipe, path: Path) -> None:
    """Writes random weights for an input of a stage: a teacher of a pre-training, or the classifier of a test."""
    torch.manual_seed(0)
    builders = {"image_teacher": build_image_teacher, "video_teacher": build_video_teacher}
    if role in builders:
        network = builders[role](recipe.teacher)  # type: ignore[union-attr]  # only a pre-training has these roles
    else:
        network = build_classifier(recipe.size, num_classes=dataset_of(recipe).classes)  # type: ignore[union-attr]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(to_official(network), temporary))


def write_samples(recipe: Recipe, folder: Path, samples: int) -> None:
    """Writes a data set in the form of the recipe's, with this number of samples in each of its lists."""
    facts = dataset_of(recipe)
    if facts.media == "image":
        _write_images(folder, facts.classes, samples)
    else:
        _write_videos(folder, facts.classes, samples)


def _write_videos(folder: Path, classes: int, samples: int) -> None:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for label in range(VIDEOS):
        frames = render(label, np.random.default_rng(label))
        enlarged = np.stack([cv2.resize(frame, (WIDTH, HEIGHT)) for frame in frames])
        write_video(folder / f"{label}.mp4", enlarged[np.arange(FRAMES) % len(enlarged)], FPS)
    lines = []
    for number in range(samples):
        name = f"videos/{number:06d}.mp4"
        _link(folder / f"{number % VIDEOS}.mp4", folder / name)
        lines.append(f"{name} {number % classes}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))


def _write_images(folder: Path, classes: int, samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (25, 32, 3), np.uint8)
    cv2.imwrite(str(folder / "image.jpg"), cv2.resize(pixels, (500, 375)))
    for number in range(max(samples, classes)):
        _link(folder / "image.jpg", folder / "train" / f"{number % classes:05d}" / f"{number:06d}.jpg")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)
