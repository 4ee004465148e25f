"""Recipes shared by the fourteen rows: the seven distillations, and fine-tuning and testing on both data sets.

Learning rates are per 256 samples. `micro_batch` is the official number of samples per GPU and step.
"""

from dataclasses import replace

from mvd.config import (
    DATASETS,
    Augmentation,
    Dataset,
    Finetune,
    ImageTeacher,
    Mixing,
    Optimization,
    Pretrain,
    Row,
    Test,
    VideoTeacher,
)
from mvd.config.errors import check

PRETRAIN_BETAS = (0.9, 0.95)
FINETUNE_BETAS = (0.9, 0.999)


def _record(dataset: str) -> Dataset:
    check(
        dataset in DATASETS,
        f"unknown data set {dataset!r}; use one of {', '.join(DATASETS)}, and for your own data set dataset and "
        "own_dataset with dataclasses.replace",
    )
    return DATASETS[dataset]


def masked_images(size: str, *, micro_batch: int) -> ImageTeacher:
    """MAE on ImageNet-1K as for its public checkpoints: 1600 epochs, batch 4096."""
    return ImageTeacher(
        size=size,
        optimization=Optimization(
            global_batch=4096,
            epochs=1600,
            warmup_epochs=40,
            base_lr=1.5e-4,
            min_lr=0.0,
            betas=PRETRAIN_BETAS,
            micro_batch=micro_batch,
        ),
    )


def masked_clips(size: str, *, global_batch: int, micro_batch: int) -> VideoTeacher:
    """VideoMAE on Kinetics-400 as for its public checkpoints: 1600 of 1601 scheduled epochs."""
    return VideoTeacher(
        size=size,
        optimization=Optimization(
            global_batch=global_batch,
            epochs=1600,
            schedule_epochs=1601,
            warmup_epochs=40,
            base_lr=1.5e-4,
            min_lr=1e-5,
            betas=PRETRAIN_BETAS,
            micro_batch=micro_batch,
        ),
    )


def distillation(
    student: str,
    teacher: str,
    *,
    epochs: int,
    global_batch: int,
    min_lr: float,
    micro_batch: int,
    drop_path: float = 0.1,
    activation_checkpointing: bool = False,
) -> Pretrain:
    """A student distilled on Kinetics-400; as officially, the schedule is one epoch longer than the run."""
    return Pretrain(
        student=student,
        teacher=teacher,
        drop_path=drop_path,
        activation_checkpointing=activation_checkpointing,
        optimization=Optimization(
            global_batch=global_batch,
            epochs=epochs,
            schedule_epochs=epochs + 1,
            warmup_epochs=40,
            base_lr=1.5e-4,
            min_lr=min_lr,
            betas=PRETRAIN_BETAS,
            micro_batch=micro_batch,
        ),
    )


VITS_FROM_VITB = distillation("small", "base", epochs=400, global_batch=1024, min_lr=1e-4, micro_batch=16)
VITS_FROM_VITL = distillation("small", "large", epochs=400, global_batch=1024, min_lr=1e-4, micro_batch=16)
VITB_FROM_VITB = distillation("base", "base", epochs=400, global_batch=1024, min_lr=1e-4, micro_batch=16)
VITB_FROM_VITL = distillation("base", "large", epochs=400, global_batch=1024, min_lr=1e-4, micro_batch=8)
VITL_E400 = distillation("large", "large", epochs=400, global_batch=512, min_lr=1e-4, micro_batch=8)
VITL_E800 = distillation("large", "large", epochs=800, global_batch=512, min_lr=1e-5, micro_batch=8)
VITH_E800 = distillation(
    "huge",
    "huge",
    epochs=800,
    global_batch=512,
    min_lr=1e-5,
    micro_batch=8,
    drop_path=0.2,
    activation_checkpointing=True,
)


def finetuning(
    size: str,
    dataset: str,
    *,
    epochs: int,
    base_lr: float,
    global_batch: int,
    micro_batch: int,
    min_lr: float = 1e-6,
    layer_decay: float = 0.75,
    drop_path: float = 0.1,
    head_dropout: float = 0.0,
    activation_checkpointing: bool = False,
) -> Finetune:
    """Supervised fine-tuning; the mixing group is the official micro-batch, one GPU's videos of one step.

    Raises:
        ConfigError: the data set has no record.
    """
    record = _record(dataset)
    return Finetune(
        size=size,
        dataset=dataset,
        sampling=record.sampling,
        drop_path=drop_path,
        head_dropout=head_dropout,
        activation_checkpointing=activation_checkpointing,
        augmentation=Augmentation(flip=0.5 if record.mirrored_is_same_class else 0.0),
        mixing=Mixing(group=micro_batch),
        optimization=Optimization(
            global_batch=global_batch,
            epochs=epochs,
            warmup_epochs=5,
            base_lr=base_lr,
            min_lr=min_lr,
            betas=FINETUNE_BETAS,
            layer_decay=layer_decay,
            micro_batch=micro_batch,
        ),
    )


def multi_view_test(size: str, dataset: str) -> Test:
    """5 clips x 3 crops on Kinetics-400, 2 x 3 on Something-Something V2.

    Raises:
        ConfigError: the data set has no record.
    """
    record = _record(dataset)
    return Test(size=size, dataset=dataset, sampling=record.sampling, clips=record.test_clips)


def on_three_splits(source: Row, dataset: str, *, epochs: int, base_lr: float) -> tuple[Row, ...]:
    """Rows that fine-tune the student of `source` on the three splits of UCF101 or HMDB51, and test it.

    The remaining settings are those of VideoMAE's fine-tuning on UCF101.
    """

    def row(split: str) -> Row:
        tuned = finetuning(
            "base",
            split,
            epochs=epochs,
            base_lr=base_lr,
            min_lr=1e-5,
            global_batch=128,
            micro_batch=16,
            layer_decay=0.7,
            drop_path=0.2,
            head_dropout=0.5,
        )
        return replace(source, name=split, finetune=tuned, test=multi_view_test("base", split), target=None)

    return tuple(row(split) for split in (dataset, f"{dataset}_split2", f"{dataset}_split3"))
