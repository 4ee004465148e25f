"""Draws what the networks see of a data set's own files: strips of frames, below each other in one picture.

The command is launch/inspect_data.py; `python -m mvd.data.inspect` runs it.
"""

import runpy
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
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
from mvd.data.on_device import MEAN, STD, mixup_of, prepare
from mvd.data.rng import epoch_order, mix_seed
from mvd.data.video.reader import open_video
from mvd.data.views import Views, decode_views

FRAMES = 8  # frames shown of a clip
LARGEST = 160  # longest side of a shown frame, in pixels
GAP, LINE = 4, 16  # pixels between frames, and height of a title
MIXED = 0.3  # weight of the lighter video, of the pairs to show: enough to be seen, and the two clips differ
SEARCHED = 200  # mixing groups among which pairs to show are searched
HIDDEN = 96  # grey level of masked tokens


class Strip(NamedTuple):
    """One line of the picture: a title and frames, uint8 (N, H, W, 3)."""

    title: str
    frames: np.ndarray


class Names(NamedTuple):
    """The names of classes; `class <number>` if they are unknown."""

    names: list[str] | None

    def of(self, number: int) -> str:
        return f"class {number}" if self.names is None else self.names[number]


def stage_strips(
    recipe: Recipe, entries: list[Entry], reader: str, videos: int, epoch: int, names: list[str] | None = None
) -> Iterator[Strip]:
    """The strips of one stage.

    Args:
        entries: the training list or, for a test, the test list.
        videos: how many files to show, of different classes as far as there are so many; in fine-tuning, how many
            videos of mixed pairs.
        epoch: the epoch whose random draws are shown.
        names: of the classes; None if they are unknown.

    Raises:
        ConfigError: too many files are unreadable.
        Unreadable: a video of a test is.
    """
    chosen, known = of_different_classes(entries, videos), Names(names)
    if isinstance(recipe, ImageTeacher):
        return image_strips(recipe, entries, reader, chosen, epoch, known)
    if isinstance(recipe, VideoTeacher | Pretrain):
        return masked_clip_strips(recipe, entries, reader, chosen, epoch, known)
    if isinstance(recipe, Finetune):
        return finetune_strips(recipe, entries, reader, max(len(chosen) // 2, 1), epoch, known)
    return view_strips(recipe, [entries[index] for index in chosen], reader, known)


def of_different_classes(entries: Sequence[Entry], videos: int) -> list[int]:
    """Up to `videos` indices in the order of the list: the first file of each class, of classes spread over all.

    If there are fewer classes than that, the second file of each follows, and so on.
    """
    seen: Counter[int] = Counter()
    rounds: list[list[int]] = []
    for index, entry in enumerate(entries):
        if seen[entry.label] == len(rounds):
            rounds.append([])
        rounds[seen[entry.label]].append(index)
        seen[entry.label] += 1
    chosen: list[int] = []
    for indices in rounds:
        wanted = min(videos - len(chosen), len(indices))
        chosen += [indices[place * len(indices) // wanted] for place in range(wanted)]
    return sorted(chosen)


def image_strips(
    recipe: ImageTeacher, entries: list[Entry], reader: str, chosen: Sequence[int], epoch: int, names: Names
) -> Iterator[Strip]:
    """Image teacher: the augmented images, and the same with the masked patches hidden."""
    shape = SIZES[recipe.size].image_training
    dataset = ImageTeacherDataset(recipe, entries, reader)
    samples = [_sample(dataset, SampleKey(epoch, index)) for index in chosen]
    frames = np.concatenate([sample["images"].permute(0, 2, 3, 1).numpy() for sample in samples])
    masks = torch.cat([sample["mask"] for sample in samples]).numpy()
    hidden = masks.reshape(-1, shape.side, shape.side)
    hidden = hidden.repeat(shape.patch_size, axis=1).repeat(shape.patch_size, axis=2)
    shown = f"{_count(len(chosen), 'image')}, the first {_name(entries, samples[0], names)}"
    yield Strip(f"image teacher, {shown}", frames)
    yield Strip(f"what its encoder sees: {_masked(samples[0])}", _hide(frames, hidden))


def masked_clip_strips(
    recipe: VideoTeacher | Pretrain,
    entries: list[Entry],
    reader: str,
    chosen: Sequence[int],
    epoch: int,
    names: Names,
) -> Iterator[Strip]:
    """Video teacher and pre-training: each cropped clip, and the same with the masked tokens hidden."""
    size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
    stage = "pre-training" if isinstance(recipe, Pretrain) else "video teacher"
    dataset = MaskedClipDataset(recipe, size.clip, size.clip.image_size, entries, reader)
    for index in chosen:
        sample = _sample(dataset, SampleKey(epoch, index))
        frames = to_frames(sample["video"][0])
        hidden = token_pixels(sample["mask"][0], size.clip)
        yield Strip(f"{stage}, {_name(entries, sample, names)}: the clip", _shown(frames))
        yield Strip(f"what the encoder sees of it: {_masked(sample)}", _shown(_hide(frames, hidden)))


def finetune_strips(
    recipe: Finetune, entries: list[Entry], reader: str, pairs: int, epoch: int, names: Names
) -> Iterator[Strip]:
    """Fine-tuning: the clips of some pairs of videos, augmented, erased and mixed; levels are clipped to 0..255."""
    dataset = FinetuneDataset(recipe, entries, reader)
    for block in mixed_pairs(recipe, entries, pairs, epoch):
        keys = [SampleKey(epoch, index, group) for group, index in unit_order([block])]
        samples = [_sample(dataset, key) for key in keys]
        batch = dataset.collate(samples)
        mixed = prepare(batch, recipe, "cpu")
        # Clip i of the unit is mixed with clip N-1-i, and a video's augmented copies follow each other.
        videos = [_video(entries, sample) for sample in samples for _ in range(recipe.augmentation.samples)]
        for clip, targets, ours, other in zip(mixed["video"], mixed["targets"], videos, reversed(videos), strict=True):
            title = f"fine-tuning, {ours} mixed with {other}; {weights(targets, names)}"
            yield Strip(title, _shown(denormalised(clip)))


def mixed_pairs(recipe: Finetune, entries: Sequence[Entry], pairs: int, epoch: int) -> list[Block]:
    """Pairs of an epoch of training whose classes differ and whose weights are closest to `MIXED`, in training's order.

    At most one of each mixing group, of the first `SEARCHED` groups; a list shorter than a batch is repeated.
    """
    batch, size = recipe.optimization.global_batch, recipe.mixing.group
    groups = max(pairs, min(SEARCHED, len(entries) // size))
    order = epoch_order(recipe.seed, epoch, len(entries))
    order *= 1 + (groups * size + batch) // len(entries)
    found: list[tuple[float, Block]] = []
    update = 0
    while len(found) < groups:
        blocks = update_blocks(recipe, order, update)
        for _, group in groupby(blocks, key=lambda block: block.group):
            found.append(min(((_distance(recipe, entries, epoch, block), block) for block in group), key=itemgetter(0)))
        update += 1
    best = sorted(found[:groups], key=itemgetter(0))[:pairs]
    return sorted((block for _, block in best), key=lambda block: block.group)


def _distance(recipe: Finetune, entries: Sequence[Entry], epoch: int, pair: Block) -> float:
    """How far the weight of a pair's lighter video is from `MIXED`; 1 if both videos are of one class."""
    one, other = pair.samples
    if entries[one].label == entries[other].label:
        return 1.0
    side = SIZES[recipe.size].clip.image_size
    share = mixup_of(recipe).draw(side, side, np.random.RandomState(mix_seed(recipe.seed, epoch, pair.group))).lam
    return abs(min(share, 1 - share) - MIXED)


def view_strips(recipe: Test, entries: Sequence[Entry], reader: str, names: Names) -> Iterator[Strip]:
    """Test: of each video, the middle frame of every view; the frames of a view hardly differ more than its crops."""
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    for entry in entries:
        cut = decode_views(open_video(entry.path, reader), views).cut()
        middle = np.stack([to_frames(view)[view.shape[1] // 2] for view in cut])
        title = f"test, {Path(entry.path).name}, {names.of(entry.label)}: the middle frame of each view, "
        yield Strip(f"{title}{recipe.clips} clips x {recipe.crops} crops", middle)


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


def weights(targets: torch.Tensor, names: Names = Names(None)) -> str:  # noqa: B008
    """The classes whose target exceeds label smoothing's floor, with their weights."""
    floor = float(targets.min())
    labels = [(float(weight), number) for number, weight in enumerate(targets) if float(weight) > floor + 1e-6]
    return "target " + " + ".join(
        f"{weight:.2f} x {names.of(number)}" for weight, number in sorted(labels, reverse=True)
    )


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


def _name(entries: Sequence[Entry], sample: dict[str, Any], names: Names) -> str:
    entry = entries[int(sample["indices"])]
    return f"{_video(entries, sample)}, {names.of(entry.label)}"


def _video(entries: Sequence[Entry], sample: dict[str, Any]) -> str:
    replaced = "".join(f" (instead of {Path(path).name}, which is unreadable)" for path in sample["unreadable"])
    return f"{Path(entries[int(sample['indices'])].path).name}{replaced}"


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
