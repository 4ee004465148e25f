"""Every stage's settings, as frozen dataclasses that refuse what cannot work and name the mend.

A recipe says what is computed; it knows no cluster (mvd.stage says how it is run). Fields marked `_HOW` are hints for
the execution: they never change a result and stay out of a stage's identity. Free of torch, so that the launcher
starts in a moment.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf

from mvd.sizes import SIZES

Kind = Literal["image_teacher", "video_teacher", "pretrain", "finetune", "test"]
Sampling = Literal["dense", "segment"]
Precision = Literal["bf16", "fp32"]

SHORT_SIZE = {"tiny": "tiny", "small": "vits", "base": "vitb", "large": "vitl", "huge": "vith"}
_HOW = {"digest": False}
_IF_SET = {"digest_unset": False}  # for fields that came later: unset, identities are as they were


class ConfigError(ValueError):
    """A setting that cannot work: one sentence that says what, where, and the mend."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Facts of a data set: kind of files, classes, and the lengths of its lists (of the paper's sets, those it used).

    A row file declares one for data of its own, and gives it to its recipes as `own_dataset`.
    """

    media: Literal["video", "image"] = "video"
    classes: int
    train_samples: int
    val_samples: int = 0

    def __post_init__(self) -> None:
        _check(self.classes > 1, f"classes is {self.classes}; a data set to tell classes apart has two at least")
        _check(self.train_samples > 0, f"train_samples is {self.train_samples}; give the length of the training list")
        _check(self.val_samples >= 0, f"val_samples is {self.val_samples}; give the length of the validation list")


DATASETS: dict[str, Dataset] = {
    "k400": Dataset(media="video", classes=400, train_samples=240_436, val_samples=19_796),
    "ssv2": Dataset(media="video", classes=174, train_samples=168_913, val_samples=24_777),
    "imagenet": Dataset(media="image", classes=1000, train_samples=1_281_167, val_samples=50_000),
    "motion": Dataset(media="video", classes=8, train_samples=2400, val_samples=320),
}


def facts_of(recipe: "Recipe") -> Dataset:
    """The facts of a recipe's data set."""
    return recipe.own_dataset or DATASETS[recipe.dataset]


def _check_size(name: str, field_name: str) -> None:
    _check(name in SIZES, f"{field_name}: unknown model size {name!r}; use one of {', '.join(SIZES)}")


def _check_seed(seed: int, field_name: str) -> None:
    _check(seed >= 0, f"{field_name} is {seed}; give 0 or more")


def _check_dataset(recipe: "Recipe", section: str) -> None:
    """Refuses a name that is not known and not declared, and videos or images where the other is due."""
    name, own = recipe.dataset, recipe.own_dataset
    media = "image" if isinstance(recipe, ImageTeacher) else "video"
    if own is None:
        known = [k for k, v in DATASETS.items() if v.media == media or (media == "image" and k == "motion")]
        choice = f"use one of {', '.join(known)}, or declare your own as {section}.own_dataset"
        _check(name in known, f"{section}.dataset: no {media} data set is called {name!r}; {choice}")
        return
    _check(name not in DATASETS, f"{section}: {name} needs no own_dataset; leave it out, or call your data otherwise")
    _check(
        re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
        f"{section}.dataset: the cluster profile is to name {name!r}, so use letters, digits, _ and -",
    )
    _check(media in (own.media, "image"), f"{section}.own_dataset: {name} holds {own.media}s; give one of videos")


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
    micro_batch: int = field(metadata=_HOW)  # the official samples per GPU and step: the batch solver's ceiling

    def __post_init__(self) -> None:
        _check(self.global_batch > 0, f"global_batch is {self.global_batch}; give a positive number of samples")
        _check(self.micro_batch > 0, f"micro_batch is {self.micro_batch}; give a positive number of samples")
        _check(self.epochs > 0, f"epochs is {self.epochs}; give a positive number")
        _check(
            self.laid_out_epochs >= self.epochs,
            f"schedule_epochs is {self.schedule_epochs}, shorter than epochs={self.epochs}; make it at least that",
        )
        _check(
            0 <= self.warmup_epochs <= self.laid_out_epochs,
            f"warmup_epochs is {self.warmup_epochs}; keep it between 0 and the {self.laid_out_epochs} of the schedule",
        )
        _check(0 < self.base_lr < math.inf, f"base_lr is {self.base_lr}; give a positive learning rate")
        _check(0 <= self.min_lr < math.inf, f"min_lr is {self.min_lr}; give 0 or a positive number")
        _check(
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
    own_dataset: Dataset | None = field(default=None, metadata=_IF_SET)
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
        return f"mae_{SHORT_SIZE[self.size]}"


@dataclass(frozen=True, kw_only=True)
class VideoTeacher:
    """A masked autoencoder of clips (VideoMAE): how the video teacher is trained."""

    size: str
    dataset: str = "k400"
    own_dataset: Dataset | None = field(default=None, metadata=_IF_SET)
    mask_ratio: float = 0.9
    stride: int = 4
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=_HOW)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "video_teacher.seed")
        _check_size(self.size, "video_teacher.size")
        _check_dataset(self, "video_teacher")
        _check_mask(self.mask_ratio, "video_teacher.mask_ratio")
        _check(self.stride > 0, f"video_teacher.stride is {self.stride}; give a positive number of frames")

    @property
    def name(self) -> str:
        return f"videomae_{SHORT_SIZE[self.size]}"


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Masked feature distillation of a student from an image and a video teacher of one size (paper, section 3).

    weights: a file with the student's weights, which is taken instead of running this stage.
    """

    student: str
    teacher: str
    dataset: str = "k400"
    own_dataset: Dataset | None = field(default=None, metadata=_IF_SET)
    mask_ratio: float = 0.9
    stride: int = 4
    drop_path: float = 0.1
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=_HOW)
    weights: str | None = field(default=None, metadata=_HOW)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "pretrain.seed")
        _check_size(self.student, "pretrain.student")
        _check_size(self.teacher, "pretrain.teacher")
        _check_dataset(self, "pretrain")
        _check_mask(self.mask_ratio, "pretrain.mask_ratio")
        _check(self.stride > 0, f"pretrain.stride is {self.stride}; give a positive number of frames")
        student, teacher = SIZES[self.student], SIZES[self.teacher]
        _check(
            (student.clip.slices, student.clip.positions) == (teacher.clip.slices, teacher.image.positions),
            f"pretrain: a {self.teacher} teacher's tokens do not line up with a {self.student} student's; "
            "choose sizes with the same grid",
        )

    @property
    def name(self) -> str:
        return f"{SHORT_SIZE[self.student]}_from_{SHORT_SIZE[self.teacher]}_e{self.optimization.epochs}"


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
        _check(0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, f"crop_scale {self.crop_scale} is not within (0, 1]")
        _check(0 <= self.flip <= 1 and 0 <= self.erase <= 1, "flip and erase are probabilities; keep them in [0, 1]")
        _check(self.samples >= 1, f"samples is {self.samples}; each video gives at least one")


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
        _check(
            self.group >= 2 and self.group % 2 == 0,
            f"mixing.group is {self.group}; a video is mixed with another one, so give an even number of videos",
        )
        _check(0 <= self.smoothing < 1, f"mixing.smoothing is {self.smoothing}; keep it in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Supervised fine-tuning of a pre-trained encoder (or of random weights, where a row has no pretrain).

    weights: a file with the classifier's weights, which is taken instead of running this stage.
    """

    size: str
    dataset: str
    own_dataset: Dataset | None = field(default=None, metadata=_IF_SET)
    sampling: Sampling
    stride: int = 4
    drop_path: float
    head_dropout: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixing: Mixing
    optimization: Optimization
    seed: int = 0
    activation_checkpointing: bool = field(default=False, metadata=_HOW)
    weights: str | None = field(default=None, metadata=_HOW)

    def __post_init__(self) -> None:
        _check_seed(self.seed, "finetune.seed")
        _check_size(self.size, "finetune.size")
        _check_dataset(self, "finetune")
        _check(
            self.optimization.global_batch % self.mixing.group == 0,
            f"finetune: a global batch of {self.optimization.global_batch} videos does not hold whole mixing groups "
            f"of {self.mixing.group}; change one of the two",
        )
        _check(
            not (self.dataset == "ssv2" and self.augmentation.flip > 0),
            "finetune.augmentation.flip: Something-Something labels tell left from right; set it to 0",
        )


@dataclass(frozen=True, kw_only=True)
class Test:
    """Multi-view testing: clips x crops views of each video, softmax, mean, top-1 and top-5."""

    size: str
    dataset: str
    own_dataset: Dataset | None = field(default=None, metadata=_IF_SET)
    sampling: Sampling
    stride: int = 4
    clips: int
    crops: int = 3

    def __post_init__(self) -> None:
        _check_size(self.size, "test.size")
        _check_dataset(self, "test")
        _check(self.clips > 0 and self.crops > 0, "test: clips and crops are counts of views; give positive numbers")


TrainRecipe = ImageTeacher | VideoTeacher | Pretrain | Finetune
Recipe = TrainRecipe | Test
RECIPES: dict[str, type] = {
    "image_teacher": ImageTeacher,
    "video_teacher": VideoTeacher,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "test": Test,
}


def _check_mask(ratio: float, field_name: str) -> None:
    _check(0 < ratio < 1, f"{field_name} is {ratio}; keep it between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The accuracy a row is to reach, in percent, and who says so."""

    top1: float
    top5: float | None = None
    source: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: its stages and the accuracy it is to reach.

    teachers: "checkpoint" takes the files that cluster.yaml names; "train" runs the two teacher stages first.
    """

    name: str
    teachers: Literal["checkpoint", "train"] = "checkpoint"
    image_teacher: ImageTeacher | None = None
    video_teacher: VideoTeacher | None = None
    pretrain: Pretrain | None = None
    finetune: Finetune | None = None
    test: Test | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        _check(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            f"a row is called {self.name!r}; its folders are named after it, so use letters, digits, _, . and -",
        )
        _check(self.test is None or self.finetune is not None, f"row {self.name}: a test needs a finetune to test")
        if self.pretrain is not None:
            for role in ("image_teacher", "video_teacher"):
                teacher = getattr(self, role)
                _check(
                    teacher is not None and teacher.size == self.pretrain.teacher,
                    f"row {self.name}: pretrain.teacher is {self.pretrain.teacher!r}; give an {role} of that size",
                )
        if self.pretrain is not None and self.finetune is not None:
            _check(
                self.pretrain.student == self.finetune.size,
                f"row {self.name}: pretrain.student is {self.pretrain.student!r} but finetune.size is "
                f"{self.finetune.size!r}; make them equal",
            )
        if self.finetune is not None and self.test is not None:
            for name in ("size", "dataset", "own_dataset", "sampling"):
                _check(
                    getattr(self.finetune, name) == getattr(self.test, name),
                    f"row {self.name}: finetune.{name} and test.{name} differ; make them equal",
                )


def merge_typed(base: Any, *layers: Any) -> Any:
    """Merges OmegaConf layers into a structured base, whose types check them (frozen dataclasses start read-only)."""
    OmegaConf.set_readonly(base, False)
    return OmegaConf.merge(base, *layers)
