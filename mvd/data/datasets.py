"""The training data set of each kind of stage: uint8 samples on the CPU, drawn from (seed, epoch, index) alone."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from mvd.config import ConfigError, Finetune, ImageTeacher, Pretrain, VideoTeacher, dataset_of
from mvd.config.run_settings import DatasetPaths
from mvd.config.sizes import SIZES, ClipShape
from mvd.data.annotations import Entry, Split, load_split
from mvd.data.clip import crops
from mvd.data.clip.frame_sampling import dense_train_indices, pretrain_indices, segment_train_indices
from mvd.data.clip.masking import random_mask, tube_mask
from mvd.data.packed import PackedEntries
from mvd.data.randaugment.policy import apply_operations, draw_operations
from mvd.data.rng import Purpose, epoch_order, generator, mix_seed
from mvd.data.video.errors import Unreadable
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.video.reader import open_video, read_image
from mvd.stage import Stage

REPLACEMENTS = 10  # replacements that are tried for an unreadable file before the run gives up


@dataclass(frozen=True)
class SampleKey:
    """Identifies a sample: all its random draws follow from this key and the recipe's seed.

    group: index of the mixing group in the epoch (fine-tuning only).
    """

    epoch: int
    index: int
    group: int = 0


class TrainDataset(ABC, Dataset[dict[str, Any]]):
    """The training split of a stage, keyed by SampleKey.

    A sample is a dictionary of tensors with a leading axis for its augmented copies, plus "indices" (1,), the index of
    the file that was read, "layer_seeds" (copies,), the seeds of the network's random draws (drop path), "decode_ms"
    (1,), the decoding time, and "unreadable", the paths that could not be read. An unreadable file is tried twice and
    then replaced by the next one in the epoch's order, with the draws of the key; if `REPLACEMENTS` replacements are
    unreadable as well, the sample is {"failed": reason}.
    """

    timeout = ReadTimeout()

    def __init__(self, seed: int, entries: list[Entry], reader: str) -> None:
        self.seed = seed
        self.entries = PackedEntries(entries)
        self.reader = reader
        self.decode_ms = 0.0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        unreadable: list[str] = []
        for index in self._candidates(key):
            for _ in range(2):
                try:
                    with self.timeout.reading(self.entries[index].path):
                        sample = self.sample(self.entries[index], key)
                except Unreadable as error:
                    last = error
                    continue
                facts = {
                    "indices": torch.tensor([index]),
                    "layer_seeds": self._layer_seeds(key, sample),
                    "decode_ms": torch.tensor([self.decode_ms]),
                }
                return {**sample, **facts, "unreadable": unreadable}
            unreadable.append(self.entries[index].path)
        return {"failed": f"{len(unreadable)} consecutive files cannot be read, the last one: {last}"}

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """Indices of the sample's own file, then of those that follow it in the epoch's order."""
        yield key.index
        order = epoch_order(self.seed, key.epoch, len(self))
        place = order.index(key.index)
        for shift in range(1, REPLACEMENTS + 1):
            yield order[(place + shift) % len(self)]

    def _layer_seeds(self, key: SampleKey, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        copies = len(next(iter(sample.values())))
        draws = [self.draws(key, Purpose.LAYERS, copy).integers(2**62) for copy in range(copies)]
        return torch.tensor(draws, dtype=torch.int64)

    @abstractmethod
    def sample(self, entry: Entry, key: SampleKey) -> dict[str, torch.Tensor]:
        """Read one file and build its sample."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Concatenate samples to a micro-batch; {"failed": reason} if one of them failed."""
        failed = [sample["failed"] for sample in samples if "failed" in sample]
        if failed:
            return {"failed": failed[0]}
        batch: dict[str, Any] = {
            name: torch.cat([sample[name] for sample in samples]) for name in samples[0] if name != "unreadable"
        }
        batch["unreadable"] = [path for sample in samples for path in sample["unreadable"]]
        return batch

    def decode(self, entry: Entry, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        """Decode the frames with the indices that `choose(length)` returns: uint8 (T, H, W, 3)."""
        started = time.perf_counter()
        video = open_video(entry.path, self.reader)
        frames = video.frames(choose(len(video)))
        self.decode_ms = 1000 * (time.perf_counter() - started)
        return frames

    def draws(self, key: SampleKey, purpose: Purpose, copy: int = 0) -> np.random.Generator:
        """The random generator for one purpose of a sample."""
        return generator(self.seed, key.epoch, key.index, purpose, copy)


def channels_first(frames: np.ndarray, planes: np.ndarray) -> None:
    """Copy uint8 frames (T, H, W, 3) to planes (3, T, H, W); eight times as fast as numpy's transpose."""
    for number, frame in enumerate(frames):
        cv2.split(frame, list(planes[:, number]))


def to_clip(frames: np.ndarray) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 tensor (3, T, H, W)."""
    planes = np.empty((3, *frames.shape[:3]), np.uint8)
    channels_first(frames, planes)
    return torch.from_numpy(planes)


class ImageTeacherDataset(TrainDataset):
    """MAE's samples: {"images": (1, 3, S, S), "mask": (1, positions)}. A video gives one random frame."""

    def __init__(self, recipe: ImageTeacher, entries: list[Entry], reader: str) -> None:
        super().__init__(recipe.seed, entries, reader)
        self.recipe = recipe
        self.shape = SIZES[recipe.size].image_training
        self.media = dataset_of(recipe).media

    def sample(self, entry: Entry, key: SampleKey) -> dict[str, torch.Tensor]:
        image = read_image(entry.path) if self.media == "image" else self._random_frame(entry, key)
        rng = self.draws(key, Purpose.CROP)
        height, width = image.shape[:2]
        box = crops.random_resized_box(height, width, self.recipe.crop_scale, (3 / 4, 4 / 3), rng)
        frames = crops.resize_bicubic(crops.cut(image[None], box)[0], self.shape.image_size)[None]
        if rng.random() < self.recipe.flip:
            frames = crops.mirror(frames)
        mask = random_mask(self.draws(key, Purpose.MASK), self.shape.positions, self.recipe.mask_ratio)
        return {"images": to_clip(frames)[None, :, 0], "mask": torch.from_numpy(mask)[None]}

    def _random_frame(self, entry: Entry, key: SampleKey) -> np.ndarray:
        rng = self.draws(key, Purpose.FRAMES)
        frame: np.ndarray = self.decode(entry, lambda length: rng.integers(length, size=1))[0]
        return frame


class MaskedClipDataset(TrainDataset):
    """Samples of the video teacher and the student: {"video": (1, 3, T, S, S), "mask": (1, tokens)}.

    If the image teacher's input size differs, samples also hold "image_video", the same crop at that size.
    """

    def __init__(
        self, recipe: VideoTeacher | Pretrain, clip: ClipShape, image_size: int, entries: list[Entry], reader: str
    ) -> None:
        super().__init__(recipe.seed, entries, reader)
        self.recipe = recipe
        self.clip = clip
        self.image_size = image_size

    def sample(self, entry: Entry, key: SampleKey) -> dict[str, torch.Tensor]:
        rng, stride = self.draws(key, Purpose.FRAMES), self.recipe.stride
        frames = self.decode(entry, lambda length: pretrain_indices(length, rng, self.clip.frames, stride))
        height, width = frames.shape[1:3]
        box = crops.multi_scale_box(height, width, self.clip.image_size, self.draws(key, Purpose.CROP))
        mask = tube_mask(self.draws(key, Purpose.MASK), self.clip, self.recipe.mask_ratio)
        frames = crops.cut(frames, box)
        sample = {
            "video": to_clip(crops.resize_smoothly(frames, self.clip.image_size))[None],
            "mask": torch.from_numpy(mask)[None],
        }
        if self.image_size != self.clip.image_size:
            sample["image_video"] = to_clip(crops.resize_smoothly(frames, self.image_size))[None]
        return sample


class FinetuneDataset(TrainDataset):
    """Fine-tuning's samples; a video is decoded once for its N augmented copies (QUIRKS 3).

    {"video": (N, 3, T, S, S), "labels": (N,), "erase": (N, 4) boxes (top, left, height, width) to fill with noise,
    "noise_seeds": (N,), "mix_seeds": (N,), equal for all clips of a mixing group}.
    """

    def __init__(self, recipe: Finetune, entries: list[Entry], reader: str) -> None:
        super().__init__(recipe.seed, entries, reader)
        self.recipe = recipe
        self.clip = SIZES[recipe.size].clip

    def sample(self, entry: Entry, key: SampleKey) -> dict[str, torch.Tensor]:
        frames = self._read(entry, key)
        copies = self.recipe.augmentation.samples
        video = np.empty((copies, 3, self.clip.frames, self.clip.image_size, self.clip.image_size), np.uint8)
        boxes, seeds = zip(*(self._augment(frames, key, copy, video[copy]) for copy in range(copies)), strict=True)
        return {
            "video": torch.from_numpy(video),
            "labels": torch.full((copies,), entry.label),
            "erase": torch.tensor(boxes),
            "noise_seeds": torch.tensor(seeds),
            "mix_seeds": torch.full((copies,), mix_seed(self.seed, key.epoch, key.group)),
        }

    def _read(self, entry: Entry, key: SampleKey) -> np.ndarray:
        rng, frames, stride = self.draws(key, Purpose.FRAMES), self.clip.frames, self.recipe.stride
        if self.recipe.sampling == "dense":
            return self.decode(entry, lambda length: dense_train_indices(length, rng, frames, stride))
        return self.decode(entry, lambda length: segment_train_indices(length, rng, frames))

    def _augment(self, frames: np.ndarray, key: SampleKey, copy: int, planes: np.ndarray) -> tuple[crops.Box, int]:
        """Write one augmented copy to planes (3, T, S, S); return its erasing box and the seed of its noise."""
        settings, size = self.recipe.augmentation, self.clip.image_size
        rng = self.draws(key, Purpose.AUGMENT, copy)
        operations = [] if settings.auto is None else draw_operations(settings.auto, rng)
        height, width = frames.shape[1:3]
        box = crops.random_resized_box(height, width, settings.crop_scale, settings.crop_ratio, rng)
        clip = crops.resize_bilinear(apply_operations(frames, operations, box), size)
        if rng.random() < settings.flip:
            clip = crops.mirror(clip)
        channels_first(clip, planes)
        return crops.erase_box(size, settings.erase, rng), int(rng.integers(2**62))


def dataset_paths(stage: Stage) -> DatasetPaths:
    """The paths of the stage's data set.

    Raises:
        ConfigError: the stage has none.
    """
    if stage.execution.data is None:
        name = stage.recipe.dataset
        raise ConfigError(f"stage {stage.id}: no path for data set {name}; set datasets.{name}.root in cluster.yaml")
    return stage.execution.data


def load_entries(stage: Stage, split: Split) -> list[Entry]:
    """The videos of a split of the stage's data set."""
    return load_split(stage.recipe, dataset_paths(stage), split)


def build_dataset(stage: Stage) -> TrainDataset:
    """The training split of a stage.

    Raises:
        ConfigError: no path, or a list that contradicts the data set's record.
    """
    recipe, paths, reader = stage.recipe, dataset_paths(stage), stage.execution.reader
    entries = load_split(recipe, paths, "train")
    if isinstance(recipe, ImageTeacher):
        return ImageTeacherDataset(recipe, entries, reader)
    if isinstance(recipe, VideoTeacher):
        clip = SIZES[recipe.size].clip
        return MaskedClipDataset(recipe, clip, clip.image_size, entries, reader)
    if isinstance(recipe, Pretrain):
        image_size = SIZES[recipe.teacher].image.image_size
        return MaskedClipDataset(recipe, SIZES[recipe.student].clip, image_size, entries, reader)
    if isinstance(recipe, Finetune):
        return FinetuneDataset(recipe, entries, reader)
    raise ConfigError(f"stage {stage.id}: a {stage.kind} stage has no training data")
