"""The recipes: every setting of each kind of stage, as frozen dataclasses that refuse invalid combinations.

A recipe says what is computed and knows no cluster (mvd.stage says how it is run). Must not import torch: that keeps
the launcher's start-up fast.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from mvd.config.datasets import DATASETS, Dataset, Media, Sampling
from mvd.config.errors import check
from mvd.config.fields import NOT_HASHED, since
from mvd.config.sizes import SIZES

Kind = Literal["image_teacher", "video_teacher", "pretrain", "finetune", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which they depend on each other


def dataset_of(recipe: "Recipe") -> Dataset:
    """The record of a recipe's data set."""
    return recipe.own_dataset or DATASETS[recipe.dataset]


def _check_size(name: str, field_name: str) -> None:
    check(name in SIZES, f"{field_name}: unknown model size {name!r}; use one of {', '.join(SIZES)}")


def _check_seed(seed: int, field_name: str) -> None:
    check(seed >= 0, f"{field_name} must be 0 or more, got {seed}")


def _check_mask(ratio: float, field_name: str) -> None:
    check(0 < ratio < 1, f"{field_name} must be between 0 and 1, got {ratio}")


def _check_dataset(recipe: "Recipe", section: str) -> None:
    """Refuses a name that is neither known nor declared, and videos where images are needed or the reverse."""
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
        f"{section}.own_dataset must hold videos, got media={own.media!r} for {name}; declare a data set of videos",
    )


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW under a cosine schedule with linear warmup from 0.

    Learning rates are stated per 256 samples of the global batch, as the paper does; samples are images, clips or,
    in fine-tuning, videos (not their augmented copies). The schedule is laid out over `schedule_epochs`, of which
    `epochs` are run: the official release lays out 401 and uses the checkpoint after 400.
    """

    global_batch: int
    epochs: int
    schedule_epochs: int | None = None
    warmup_epochs: float
    base_lr: float
    min_lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.05
    eps: float = 1e-8
    layer_decay: float | None = None
    micro_batch: int = field(metadata=NOT_HASHED)  # the official samples per GPU and step: the batch solver's ceiling

    def __post_init__(self) -> None:
        check(self.global_batch > 0, f"global_batch is {self.global_batch}; give a positive number of samples")
        check(self.micro_batch > 0, f"micro_batch is {self.micro_batch}; give a positive number of samples")
        check(self.epochs > 0, f"epochs is {self.epochs}; give a positive number")
        check(
            self.laid_out_epochs >= self.epochs,
            f"schedule_epochs is {self.schedule_epochs}, shorter than epochs={self.epochs}; make it at least that",
        )
        check(
            0 <= self.warmup_epochs <= self.laid_out_epochs,
            f"warmup_epochs is {self.warmup_epochs}; keep it between 0 and the {self.laid_out_epochs} of the schedule",
        )
        check(0 < self.base_lr < math.inf, f"base_lr is {self.base_lr}; give a positive learning rate")
        check(0 <= self.min_lr < math.inf, f"min_lr is {self.min_lr}; give 0 or a positive number")
        check(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"layer_decay is {self.layer_decay}; keep it in (0, 1], or null for none",
        )

    @property
    def laid_out_epochs(self) -> int:
        return self.epochs if self.schedule_epochs is None else self.schedule_epochs

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / 256

    @property
    def floor_lr(self) -> float:
        return self.min_lr * self.global_batch / 256


@dataclass(frozen=True, kw_only=True)
class ImageTeacher:
    """A masked autoencoder of images (MAE): how the image teacher is trained."""

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
        _check_mask(self.mask_ratio, "image_teacher.mask_ratio")

    @property
    def name(self) -> str:
        return f"mae_{SIZES[self.size].short_name}"


@dataclass(frozen=True, kw_only=True)
class VideoTeacher:
    """A masked autoencoder of clips (VideoMAE): how the video teacher is trained."""

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
        _check_mask(self.mask_ratio, "video_teacher.mask_ratio")
        check(self.stride > 0, f"video_teacher.stride is {self.stride}; give a positive number of frames")

    @property
    def name(self) -> str:
        return f"videomae_{SIZES[self.size].short_name}"


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Masked feature distillation of a student from an image and a video teacher of one size (paper, section 3).

    weights: a file with the student's weights, which is taken instead of running this stage.
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
        _check_mask(self.mask_ratio, "pretrain.mask_ratio")
        check(self.stride > 0, f"pretrain.stride is {self.stride}; give a positive number of frames")
        student, teacher = SIZES[self.student], SIZES[self.teacher]
        check(
            student.clip == teacher.clip,
            f"pretrain: student and teacher must take the same clips, got {student.clip} for {self.student} and "
            f"{teacher.clip} for {self.teacher}; choose sizes with the same clip",
        )

    @property
    def name(self) -> str:
        return f"{SIZES[self.student].short_name}_from_{SIZES[self.teacher].short_name}_e{self.optimization.epochs}"


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What each training sample of fine-tuning goes through, in this order.

    auto: a timm RandAugment policy, or null for none. crop_scale and crop_ratio: random resized crop. flip and
    erase: probabilities. samples: augmented copies of each decoded clip (repeated augmentation).
    """

    auto: str | None = "rand-m7-n4-mstd0.5-inc1"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    erase: float = 0.25
    samples: int = 2

    def __post_init__(self) -> None:
        check(0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, f"crop_scale {self.crop_scale} is not within (0, 1]")
        check(0 <= self.flip <= 1 and 0 <= self.erase <= 1, "flip and erase are probabilities; keep them in [0, 1]")
        check(self.samples >= 1, f"samples is {self.samples}; each video gives at least one")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup and CutMix (one of the two for every group) with label smoothing.

    group: videos mixed with one draw, the official videos per GPU and step. cutmix_axes: "official" cuts time and
    height, as the released code does (QUIRKS 1); "spatial" cuts height and width, for people's own data.
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
            f"mixing.group is {self.group}; a video is mixed with another one, so give an even number of videos",
        )
        check(0 <= self.smoothing < 1, f"mixing.smoothing is {self.smoothing}; keep it in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised fine-tuning of a pre-trained encoder (or of random weights, where a row has no pretrain).

    weights: a file with the classifier's weights, which is taken instead of running this stage.
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
        check(
            self.optimization.global_batch % self.mixing.group == 0,
            f"finetune: a global batch of {self.optimization.global_batch} videos does not hold whole mixing groups "
            f"of {self.mixing.group}; change one of the two",
        )
        check(
            dataset_of(self).mirrored_is_same_class or self.augmentation.flip == 0,
            f"finetune.augmentation.flip must be 0 for {self.dataset}, whose labels tell left from right",
        )


@dataclass(frozen=True, kw_only=True)
class Test:
    """Multi-view testing: clips x crops views of each video, softmax, mean, top-1 and top-5."""

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
        check(self.clips > 0 and self.crops > 0, "test: clips and crops are counts of views; give positive numbers")


TrainRecipe = ImageTeacher | VideoTeacher | Pretrain | Finetune
Recipe = TrainRecipe | Test
RECIPES: dict[str, type] = {
    "image_teacher": ImageTeacher,
    "video_teacher": VideoTeacher,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "test": Test,
}
