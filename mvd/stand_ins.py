"""Random weights and generated samples, with which a stage is rehearsed before the real ones exist (mvd.rehearsal)."""

import math
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
PER_FOLDER = 256  # videos; one per class is written, the others are links, and so are all folders but one


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
    originals = folder / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    for label in range(len(CLASSES)):
        frames = render(label, np.random.default_rng(label))
        enlarged = np.stack([cv2.resize(frame, (WIDTH, HEIGHT)) for frame in frames])
        write_video(originals / f"{label:03d}.mp4", enlarged[np.arange(FRAMES) % len(enlarged)], FPS)
    for number in range(len(CLASSES), PER_FOLDER):
        os.link(originals / f"{number % len(CLASSES):03d}.mp4", originals / f"{number:03d}.mp4")
    for part in range(math.ceil(samples / PER_FOLDER)):
        (folder / f"{part:05d}").symlink_to(originals.name)
    lines = [f"{n // PER_FOLDER:05d}/{n % PER_FOLDER:03d}.mp4 {n % classes}\n" for n in range(samples)]
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines), encoding="utf-8")


def _write_images(folder: Path, classes: int, samples: int) -> None:
    originals, train = folder / "originals", folder / "train"
    originals.mkdir(parents=True, exist_ok=True)
    train.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (25, 32, 3), np.uint8)
    cv2.imwrite(str(originals / "00000.jpg"), cv2.resize(pixels, (500, 375)))
    for number in range(1, math.ceil(samples / classes)):
        os.link(originals / "00000.jpg", originals / f"{number:05d}.jpg")
    for label in range(classes):
        (train / f"{label:05d}").symlink_to(Path("..", originals.name))
