"""Draws what the networks see of a data set's own files: strips of frames, below each other in one picture.

The command is launch/inspect_data.py; `python -m mvd.data.inspect` runs it.
"""

import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from mvd.config import ConfigError, Finetune, ImageTeacher, Pretrain, Recipe, Test, VideoTeacher
from mvd.config.sizes import SIZES, ClipShape
from mvd.data.annotations import Entry
from mvd.data.datasets import FinetuneDataset, ImageTeacherDataset, MaskedClipDataset, SampleKey, TrainDataset
from mvd.data.loader import Block, unit_order, update_blocks
from mvd.data.on_device import MEAN, STD, prepare
from mvd.data.rng import epoch_order
from mvd.data.video.reader import open_video
from mvd.data.views import Views, decode_views

FRAMES = 8  # frames shown of a clip
LARGEST = 160  # longest side of a shown frame, in pixels
GAP, LINE = 4, 16  # pixels between frames, and height of a title
HIDDEN = 96  # grey level of masked tokens


class Strip(NamedTuple):
    """One line of the picture: a title and frames, uint8 (N, H, W, 3)."""

    title: str
    frames: np.ndarray


def stage_strips(recipe: Recipe, entries: list[Entry], reader: str, videos: int, epoch: int) -> Iterator[Strip]:
    """The strips of one stage.

    Args:
        entries: the training list or, for a test, the test list.
        videos: how many files to show; in fine-tuning, how many videos of mixed pairs. A test shows one video.
        epoch: the epoch whose random draws are shown.

    Raises:
        ConfigError: too many files are unreadable.
        Unreadable: the video of a test is.
    """
    videos = min(videos, len(entries))
    if isinstance(recipe, ImageTeacher):
        return image_strips(recipe, entries, reader, videos, epoch)
    if isinstance(recipe, VideoTeacher | Pretrain):
        return masked_clip_strips(recipe, entries, reader, videos, epoch)
    if isinstance(recipe, Finetune):
        return finetune_strips(recipe, entries, reader, max(videos // 2, 1), epoch)
    return view_strips(recipe, entries[0], reader)


def image_strips(recipe: ImageTeacher, entries: list[Entry], reader: str, images: int, epoch: int) -> Iterator[Strip]:
    """Image teacher: the augmented images, and the same with the masked patches hidden."""
    shape = SIZES[recipe.size].image_training
    dataset = ImageTeacherDataset(recipe, entries, reader)
    samples = [_sample(dataset, SampleKey(epoch, index)) for index in range(images)]
    frames = np.concatenate([sample["images"].permute(0, 2, 3, 1).numpy() for sample in samples])
    masks = torch.cat([sample["mask"] for sample in samples]).numpy()
    hidden = masks.reshape(-1, shape.side, shape.side)
    hidden = hidden.repeat(shape.patch_size, axis=1).repeat(shape.patch_size, axis=2)
    yield Strip(f"image teacher, {_count(images, 'image')}, the first {_name(entries, samples[0])}", frames)
    yield Strip(f"what its encoder sees: {_masked(samples[0])}", _hide(frames, hidden))


def masked_clip_strips(
    recipe: VideoTeacher | Pretrain, entries: list[Entry], reader: str, videos: int, epoch: int
) -> Iterator[Strip]:
    """Video teacher and pre-training: each cropped clip, and the same with the masked tokens hidden."""
    size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
    stage = "pre-training" if isinstance(recipe, Pretrain) else "video teacher"
    dataset = MaskedClipDataset(recipe, size.clip, size.clip.image_size, entries, reader)
    for index in range(videos):
        sample = _sample(dataset, SampleKey(epoch, index))
        frames = to_frames(sample["video"][0])
        hidden = token_pixels(sample["mask"][0], size.clip)
        yield Strip(f"{stage}, {_name(entries, sample)}: the clip", _shown(frames))
        yield Strip(f"what the encoder sees of it: {_masked(sample)}", _shown(_hide(frames, hidden)))


def finetune_strips(recipe: Finetune, entries: list[Entry], reader: str, pairs: int, epoch: int) -> Iterator[Strip]:
    """Fine-tuning: the clips of some pairs of videos, augmented, erased and mixed; levels are clipped to 0..255."""
    dataset = FinetuneDataset(recipe, entries, reader)
    for block in mixed_pairs(recipe, len(entries), pairs, epoch):
        keys = [SampleKey(epoch, index, group) for group, index in unit_order([block])]
        batch = dataset.collate([_sample(dataset, key) for key in keys])
        mixed = prepare(batch, recipe, "cpu")
        for clip, targets, label in zip(mixed["video"], mixed["targets"], batch["labels"].tolist(), strict=True):
            yield Strip(f"fine-tuning, a clip of class {label}; {weights(targets)}", _shown(denormalised(clip)))


def mixed_pairs(recipe: Finetune, samples: int, pairs: int, epoch: int) -> list[Block]:
    """The first pair of each of the epoch's first mixing groups; a list shorter than a batch is repeated."""
    batch, size = recipe.optimization.global_batch, recipe.mixing.group
    order = epoch_order(recipe.seed, epoch, samples)
    order *= 1 + (pairs * size + batch) // samples
    blocks: list[Block] = []
    update = 0
    while len(blocks) < pairs:
        blocks += update_blocks(recipe, order, update)[:: size // 2]
        update += 1
    return blocks[:pairs]


def view_strips(recipe: Test, entry: Entry, reader: str) -> Iterator[Strip]:
    """Test: every view of one video."""
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    for number, view in enumerate(decode_views(open_video(entry.path, reader), views).cut()):
        title = f"test, {Path(entry.path).name}, class {entry.label}: "
        title += f"clip {number // recipe.crops + 1} of {recipe.clips}, crop {number % recipe.crops + 1}"
        yield Strip(title, _shown(to_frames(view)))


def to_frames(clip: torch.Tensor) -> np.ndarray:
    """uint8 (3, T, S, S) -> (T, S, S, 3)."""
    return clip.permute(1, 2, 3, 0).numpy()


def denormalised(clip: torch.Tensor) -> np.ndarray:
    """Normalised float (3, T, S, S) -> uint8 (T, S, S, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return to_frames(((clip * std + mean) * 255).round().clamp(0, 255).byte())


def token_pixels(mask: torch.Tensor, clip: ClipShape) -> np.ndarray:
    """bool (tokens,) -> bool (T, S, S): the pixels of the masked tokens."""
    tokens = mask.numpy().reshape(clip.slices, clip.side, clip.side)
    for axis, times in enumerate((clip.tubelet, clip.patch_size, clip.patch_size)):
        tokens = tokens.repeat(times, axis=axis)
    return tokens


def weights(targets: torch.Tensor) -> str:
    """The classes whose target exceeds label smoothing's floor, with their weights."""
    floor = float(targets.min())
    labels = [(float(weight), number) for number, weight in enumerate(targets) if float(weight) > floor + 1e-6]
    return "target " + " + ".join(f"{weight:.2f} x class {number}" for weight, number in sorted(labels, reverse=True))


def _sample(dataset: TrainDataset, key: SampleKey) -> dict[str, Any]:
    sample = dataset[key]
    if "failed" in sample:
        raise ConfigError(f"{sample['failed']}; run mvd.data.prepare on this data set to find all broken files")
    return sample


def _shown(frames: np.ndarray) -> np.ndarray:
    return frames[:: max(len(frames) // FRAMES, 1)]


def _hide(frames: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    return np.where(hidden[..., None], HIDDEN, frames).astype(np.uint8)


def _masked(sample: dict[str, Any]) -> str:
    return f"{100 * float(sample['mask'].float().mean()):.0f} % is masked"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _name(entries: Sequence[Entry], sample: dict[str, Any]) -> str:
    entry = entries[int(sample["indices"])]
    replaced = "".join(f" (instead of {Path(path).name}, which is unreadable)" for path in sample["unreadable"])
    return f"{Path(entry.path).name}, class {entry.label}{replaced}"


def draw(strips: Sequence[Strip], path: Path) -> None:
    """Write the strips of square frames below each other to an image file; its suffix is the format."""
    sheet(strips).save(path)


def sheet(strips: Sequence[Strip]) -> Image.Image:
    """The strips of square frames below each other, with their titles."""
    sides = [min(strip.frames.shape[1], LARGEST) for strip in strips]
    heights = [LINE + side + GAP for side in sides]
    width = max(len(strip.frames) * (side + GAP) for strip, side in zip(strips, sides, strict=True)) + GAP
    picture = Image.new("RGB", (max(width, 480), sum(heights) + GAP), "white")
    top = GAP
    for strip, side, height in zip(strips, sides, heights, strict=True):
        ImageDraw.Draw(picture).text((GAP, top), strip.title, fill="black")
        for number, frame in enumerate(strip.frames):
            picture.paste(Image.fromarray(frame).resize((side, side)), (GAP + number * (side + GAP), top + LINE))
        top += height
    return picture


if __name__ == "__main__":  # the command is one of the launcher's, which this room must not import
    runpy.run_module("launch.inspect_data", run_name="__main__", alter_sys=True)
