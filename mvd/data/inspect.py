"""Draws what a row's networks really see, from a data set's own files: one PNG to look at before GPUs are spent.

    python -m mvd.data.inspect vitb_from_vitb_k400                   # the data set's place is taken from cluster.yaml
    python -m mvd.data.inspect demo --data data/motion --epoch 3
    python -m mvd.data.inspect my_row.py --data data/mine --output seen.png

Pre-training: each clip after its crop, and below it the tokens that stay visible. Fine-tuning: the clips of videos
that are mixed together, augmented, erased and mixed, with the weight of each label. Test: every view of a video.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from mvd.config import ConfigError, Finetune, Pretrain, Row, Test
from mvd.config.run_settings import DatasetPaths
from mvd.config.sizes import SIZES, ClipShape
from mvd.data.annotations import Entry, Split, load_split
from mvd.data.datasets import FinetuneDataset, MaskedClipDataset, SampleKey
from mvd.data.loader import unit_order, update_blocks
from mvd.data.on_device import MEAN, STD, prepare
from mvd.data.video.errors import Unreadable
from mvd.data.video.reader import open_video
from mvd.data.views import Views, decode_views

FRAMES = 8  # shown of a clip's 16
LARGEST = 160  # side of a picture, in pixels
GAP, LINE = 4, 16  # pixels between pictures, and of a line of text
HIDDEN = 96  # grey of a token that the student does not see


class Strip(NamedTuple):
    """One line of the picture: what it shows, and frames (N, H, W, 3), uint8."""

    title: str
    frames: np.ndarray


def pretrain_strips(recipe: Pretrain, entries: list[Entry], videos: int, epoch: int) -> Iterator[Strip]:
    """Each clip as the teachers see it, and what the student sees of it."""
    clip, image_size = SIZES[recipe.student].clip, SIZES[recipe.teacher].image.image_size
    dataset = MaskedClipDataset(recipe, clip, image_size, entries, "pyav")
    for index in range(videos):
        sample = dataset[SampleKey(epoch, index)]
        frames = to_frames(sample["video"][0])
        yield Strip(f"pre-training, {_name(entries, sample)}: the clip", frames[:: clip.frames // FRAMES])
        hidden = token_pixels(sample["mask"][0], clip)
        seen = np.where(hidden[..., None], HIDDEN, frames).astype(np.uint8)
        share = 100 * float(sample["mask"].float().mean())
        yield Strip(f"what the student sees of it: {share:.0f} % is masked", seen[:: clip.frames // FRAMES])


def finetune_strips(recipe: Finetune, entries: list[Entry], pairs: int, epoch: int) -> Iterator[Strip]:
    """All clips of some mixed pairs of videos, as they reach the network; values are cut at black and white."""
    dataset = FinetuneDataset(recipe, entries, "pyav")
    order = list(range(len(entries)))
    blocks = update_blocks(recipe, order * (recipe.optimization.global_batch // len(order) + 1), 0)
    step = SIZES[recipe.size].clip.frames // FRAMES
    for number in range(pairs):
        group = recipe.mixing.group // 2
        keys = [SampleKey(epoch, index, number) for _, index in unit_order(blocks[number * group : number * group + 1])]
        batch = dataset.collate([dataset[key] for key in keys])
        mixed = prepare(batch, recipe, "cpu")
        for clip, targets, label in zip(mixed["video"], mixed["targets"], batch["labels"].tolist(), strict=True):
            yield Strip(f"fine-tuning, a clip of class {label}; {weights(targets)}", denormalised(clip)[::step])


def view_strips(recipe: Test, entries: list[Entry]) -> Iterator[Strip]:
    """Every view of the first video."""
    clip = SIZES[recipe.size].clip
    entry = entries[0]
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, clip)
    for number, view in enumerate(decode_views(open_video(entry.path), views).cut()):
        title = f"test, {Path(entry.path).name}, class {entry.label}: "
        title += f"clip {number // recipe.crops + 1} of {recipe.clips}, crop {number % recipe.crops + 1}"
        yield Strip(title, to_frames(view)[:: clip.frames // FRAMES])


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
    """The labels that label smoothing alone does not explain, with their weights."""
    floor = float(targets.min())
    labels = [(float(weight), number) for number, weight in enumerate(targets) if float(weight) > floor + 1e-6]
    return "target " + " + ".join(f"{weight:.2f} x class {number}" for weight, number in sorted(labels, reverse=True))


def _name(entries: list[Entry], sample: dict[str, torch.Tensor]) -> str:
    entry = entries[int(sample["indices"])]
    return f"{Path(entry.path).name}, class {entry.label}"


def draw(strips: list[Strip], path: Path) -> None:
    """Writes the strips of square frames below each other."""
    sides = [min(strip.frames.shape[1], LARGEST) for strip in strips]
    heights = [LINE + side + GAP for side in sides]
    width = max(len(strip.frames) * (side + GAP) for strip, side in zip(strips, sides, strict=True)) + GAP
    sheet = Image.new("RGB", (max(width, 480), sum(heights) + GAP), "white")
    top = GAP
    for strip, side, height in zip(strips, sides, heights, strict=True):
        ImageDraw.Draw(sheet).text((GAP, top), strip.title, fill="black")
        for number, frame in enumerate(strip.frames):
            sheet.paste(Image.fromarray(frame).resize((side, side)), (GAP + number * (side + GAP), top + LINE))
        top += height
    sheet.save(path)


def load_row(target: str) -> Row:
    """The row of a name in experiments/ or of a row file; of a suite, the first.

    Raises:
        ConfigError: there is no such row.
    """
    file = Path(target if target.endswith(".py") else f"{target}.py")
    try:
        if file.is_file() and file.parent.name != "experiments":
            spec = importlib.util.spec_from_file_location("row_file", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(f"experiments.{file.stem}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"there is no row {target!r}; give a name in experiments/, or a row file's path") from error
    return module.row if hasattr(module, "row") else module.rows[0]


def dataset_paths(dataset: str, folder: str | None) -> DatasetPaths:
    """The folder that was given, or else what cluster.yaml here says of the data set.

    Raises:
        ConfigError: neither says.
    """
    if folder is not None:
        return DatasetPaths(root=folder)
    profile = Path("cluster.yaml")
    known = OmegaConf.load(profile).get("datasets", {}) if profile.is_file() else {}
    if dataset not in known:
        raise ConfigError(f"where the data set {dataset} lies is not said; give --data FOLDER")
    return DatasetPaths(**known[dataset])


def strips_of(row: Row, folder: str | None, videos: int, epoch: int) -> Iterator[Strip]:
    """The strips of every stage that the row has."""

    def entries(recipe: Pretrain | Finetune | Test, split: Split) -> list[Entry]:
        return load_split(recipe, dataset_paths(recipe.dataset, folder), split)

    if row.pretrain is not None:
        yield from pretrain_strips(row.pretrain, entries(row.pretrain, "train")[:videos], videos, epoch)
    if row.finetune is not None:
        yield from finetune_strips(row.finetune, entries(row.finetune, "train"), max(videos // 2, 1), epoch)
    if row.test is not None:
        yield from view_strips(row.test, entries(row.test, "test"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvd.data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="a row: its name in experiments/, or a row file")
    parser.add_argument("--data", metavar="FOLDER", help="the data set; by default what cluster.yaml says")
    parser.add_argument("--videos", type=int, default=4, help="training videos to show (default: %(default)s)")
    parser.add_argument("--epoch", type=int, default=0, help="whose random draws to show (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("inspect.png"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    try:
        strips = list(strips_of(load_row(arguments.target), arguments.data, arguments.videos, arguments.epoch))
    except (ConfigError, Unreadable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(strips, arguments.output)
    print(f"{arguments.output}: {len(strips)} strips; open it in any image viewer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
