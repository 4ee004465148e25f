"""The recipes: all settings of each kind of stage that affect its result; invalid combinations are rejected.

A recipe does not depend on the cluster; how it is executed is in mvd.stage. Must not import torch: that keeps the
launcher's start-up fast.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from mvd.config.datasets import DATASETS, Dataset, Media, Sampling
from mvd.config.errors import check, check_positive
from mvd.config.fields import NOT_HASHED, since
from mvd.config.optimization import Optimization
from mvd.config.sizes import SIZES

Kind = Literal["image_teacher", "video_teacher", "pretrain", "finetune", "test"]
POLICY = re.compile(r"rand(-(m\d+(\.\d+)?|n[1-9]\d*|mstd\d+(\.\d+)?|mmax\d+|p[01](\.\d+)?|inc[01]|w0))*")
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which they depend on each other


def dataset_of(recipe: "Recipe") -> Dataset:
    """The record of a recipe's data set."""
    return recipe.own_dataset or DATASETS[recipe.dataset]


def _check_size(name: str, field_name: str) -> None:
    check(name in SIZES, f"{field_name}: unknown model size {name!r}; use one of {', '.join(SIZES)}")


def _check_seed(seed: int, field_name: str) -> None:
    check(seed >= 0, f"{field_name} must be 0 or more, got {seed}")


def _check_mask(ratio: float, positions: int, field_name: str) -> None:
    check(
        0 < ratio < 1 and 0 < int(ratio * positions) < positions,
        f"{field_name} must be between 0 and 1 and mask at least one of the {positions} positions, got {ratio}",
    )


def _check_crop_and_flip(recipe: "ImageTeacher | Augmentation", section: str) -> None:
    low, high = recipe.crop_scale
    check(
        0 < low <= high <= 1,
        f"{section}.crop_scale must be an ascending range within (0, 1], got {recipe.crop_scale}",
    )
    _check_probability(recipe.flip, f"{section}.flip")


def _check_probability(value: float, field_name: str) -> None:
    check(0 <= value <= 1, f"{field_name} must be a probability between 0 and 1, got {value}")


def _check_drop(rate: float, field_name: str) -> None:
    check(0 <= rate < 1, f"{field_name} must be at least 0 and below 1, got {rate}")


def _check_dataset(recipe: "Recipe", section: str) -> None:
    """Rejects a data set that is neither known nor declared, or that has the wrong media for the recipe."""
    name, own = recipe.dataset, recipe.own_dataset
    media: Media = "image" if isinstance(recipe, ImageTeacher) else "video"
    if own is None:
        known = [name for name, record in DATASETS.items() if record.supplies(media)]
        choice = f"use one of {', '.join(known)}, or declare your own as {section}.own_dataset"
        check(name in known, f"{section}.dataset: no {media} data set is called {name!r}; {choice}")
        return
    check(
        name not in DATASETS,
        f"{section}: {name} is a known data set; remove own_dataset, or use another name for your data",
    )
    check(
        re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
        f"{section}.dataset: {name!r} is used as a key of cluster.yaml; use only letters, digits, _ and -",
    )
    check(
        media in (own.media, "image"),
        f"{section}.own_dataset must have media='video', got media={own.media!r} for {name}; use a data set of videos",
    )


@dataclass(frozen=True, kw_only=True)
class ImageTeacher:
    """Training of the image teacher: a masked autoencoder of images (MAE)."""

    size: str
    dataset: str = "imagenet"
    own_dataset: Dataset | None = field(default=None, metadata=since(None))
    mask_ratio: float = 0.75
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    optimization: Optimization
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed, "image_teacher.seed")
        _check_size(self.size, "image_teacher.size")
        _check_dataset(self, "image_teacher")
        _check_mask(self.mask_ratio, SIZES[self.size].image_training.positions, "image_teacher.mask_ratio")
        _check_crop_and_flip(self, "image_teacher")

    @property
    def name(self) -> str:
        return f"mae_{SIZES[self.size].short_name}"


@dataclass(frozen=True, kw_only=True)
class VideoTeacher:
    """Training of the video teacher: a masked autoencoder of clips (VideoMAE)."""

    size: str
    dataset: str = "k400"
    own_dataset: Dataset | None = field(default=None, metadata=since(None))
    mask_ratio: float = 0.9
    stride: int = 4
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "video_teacher.seed")
        _check_size(self.size, "video_teacher.size")
        _check_dataset(self, "video_teacher")
        _check_mask(self.mask_ratio, SIZES[self.size].clip.positions, "video_teacher.mask_ratio")
        check_positive("video_teacher.stride", self.stride)

    @property
    def name(self) -> str:
        return f"videomae_{SIZES[self.size].short_name}"


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Masked feature distillation of a student from an image and a video teacher of one size (paper, section 3).

    weights: a file with the student's weights, to use instead of running this stage.
    """

    student: str
    teacher: str
    dataset: str = "k400"
    own_dataset: Dataset | None = field(default=None, metadata=since(None))
    mask_ratio: float = 0.9
    stride: int = 4
    drop_path: float = 0.1
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=NOT_HASHED)
    weights: str | None = field(default=None, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "pretrain.seed")
        _check_size(self.student, "pretrain.student")
        _check_size(self.teacher, "pretrain.teacher")
        _check_dataset(self, "pretrain")
        _check_mask(self.mask_ratio, SIZES[self.student].clip.positions, "pretrain.mask_ratio")
        check_positive("pretrain.stride", self.stride)
        _check_drop(self.drop_path, "pretrain.drop_path")
        student, teacher = SIZES[self.student], SIZES[self.teacher]
        check(
            student.clip == teacher.clip,
            f"pretrain.student and pretrain.teacher must be sizes with the same clip, got {student.clip} for "
            f"{self.student} and {teacher.clip} for {self.teacher}",
        )

    @property
    def name(self) -> str:
        return f"{SIZES[self.student].short_name}_from_{SIZES[self.teacher].short_name}_e{self.optimization.epochs}"


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentations of a fine-tuning sample, in this order.

    auto: a timm RandAugment policy, or null for none. crop_scale, crop_ratio: of the random resized crop. flip, erase:
    probabilities. samples: augmented copies of each decoded clip (repeated augmentation).
    """

    auto: str | None = "rand-m7-n4-mstd0.5-inc1"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    erase: float = 0.25
    samples: int = 2

    def __post_init__(self) -> None:
        check(
            self.auto is None or POLICY.fullmatch(self.auto) is not None,
            f"augmentation.auto must be null or a RandAugment policy such as rand-m7-n4-mstd0.5-inc1, "
            f"got {self.auto!r}",
        )
        check(
            0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf,
            f"augmentation.crop_ratio must be an ascending range of positive numbers, got {self.crop_ratio}",
        )
        _check_crop_and_flip(self, "augmentation")
        _check_probability(self.erase, "augmentation.erase")
        check(self.samples >= 1, f"augmentation.samples must be at least 1, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup and CutMix (one of the two per group) with label smoothing.

    mixup, cutmix: parameters of the beta distributions. switch: probability of CutMix. group: number of videos mixed
    with the same draw, officially the videos per GPU and step. cutmix_axes: "official" cuts time and height, as the
    released code does (QUIRKS 1); "spatial" cuts height and width, for own data.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1
    group: int
    cutmix_axes: Literal["official", "spatial"] = "official"

    def __post_init__(self) -> None:
        check(
            self.group >= 2 and self.group % 2 == 0,
            f"mixing.group must be an even number of videos, since they are mixed in pairs, got {self.group}",
        )
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"mixing.{name} must be 0 or a positive number, got {value}")
        _check_probability(self.switch, "mixing.switch")
        check(0 <= self.smoothing < 1, f"mixing.smoothing must be at least 0 and below 1, got {self.smoothing}")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised fine-tuning of a pre-trained encoder, or of random weights if the row has no pretrain.

    weights: a file with the classifier's weights, to use instead of running this stage.
    """

    size: str
    dataset: str
    own_dataset: Dataset | None = field(default=None, metadata=since(None))
    sampling: Sampling
    stride: int = 4
    drop_path: float
    head_dropout: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixing: Mixing
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=NOT_HASHED)
    weights: str | None = field(default=None, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "finetune.seed")
        _check_size(self.size, "finetune.size")
        _check_dataset(self, "finetune")
        check_positive("finetune.stride", self.stride)
        _check_drop(self.drop_path, "finetune.drop_path")
        _check_drop(self.head_dropout, "finetune.head_dropout")
        check(
            self.optimization.global_batch % self.mixing.group == 0,
            "finetune.optimization.global_batch must be a multiple of finetune.mixing.group, got "
            f"{self.optimization.global_batch} and {self.mixing.group}",
        )
        check(
            dataset_of(self).mirrored_is_same_class or self.augmentation.flip == 0,
            f"finetune.augmentation.flip must be 0 for {self.dataset}, whose labels depend on left and right, got "
            f"{self.augmentation.flip}",
        )


@dataclass(frozen=True, kw_only=True)
class Test:
    """Multi-view test: clips x crops views of each video, softmax, mean, top-1 and top-5."""

    size: str
    dataset: str
    own_dataset: Dataset | None = field(default=None, metadata=since(None))
    sampling: Sampling
    stride: int = 4
    clips: int
    crops: int = 3

    def __post_init__(self) -> None:
        _check_size(self.size, "test.size")
        _check_dataset(self, "test")
        for name in ("stride", "clips", "crops"):
            check_positive(f"test.{name}", getattr(self, name))


TrainRecipe = ImageTeacher | VideoTeacher | Pretrain | Finetune
Recipe = TrainRecipe | Test
RECIPES: dict[str, type] = {
    "image_teacher": ImageTeacher,
    "video_teacher": VideoTeacher,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "test": Test,
}
