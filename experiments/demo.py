"""The whole method at small scale: every stage, on a generated data set of eight motions, in minutes on two CPU cores.

`demo` trains both teachers, distils a student from them, fine-tunes and tests it. `demo_nano` does the same with a
smaller student, which learns from the same pass of the teachers. `demo_from_scratch` fine-tunes the network of `demo`
with the same budget from random weights. That is too little training for distillation to help: benchmarks/
demo.py compares both with a student that was not trained.
"""

from mvd.config import (
    Augmentation,
    Finetune,
    ImageTeacher,
    Mixing,
    Optimization,
    Pretrain,
    Row,
    Target,
    Test,
    VideoTeacher,
)


def optimization(epochs: int, *, peak_lr: float, batch: int = 16) -> Optimization:
    """A few hundred small updates, with beta2 and warmup chosen for so short a run."""
    return Optimization(
        global_batch=batch,
        epochs=epochs,
        warmup_epochs=0.5,
        base_lr=peak_lr * 256 / batch,
        min_lr=0.01 * peak_lr * 256 / batch,
        betas=(0.9, 0.95),
        micro_batch=batch // 2,
    )


def finetune_of(size: str) -> Finetune:
    """The same fine-tuning for every network."""
    return Finetune(
        size=size,
        dataset="motion",
        sampling="dense",
        stride=1,
        drop_path=0.0,
        # No flip and no RandAugment: a mirrored "left" is a "right", and shearing changes the direction of motion.
        augmentation=Augmentation(auto=None, crop_scale=(0.7, 1.0), flip=0.0, erase=0.0, samples=1),
        mixing=Mixing(mixup=0.1, cutmix=0.0, group=8),
        optimization=optimization(5, peak_lr=3e-3),
    )


def pretrain_of(student: str) -> Pretrain:
    """Both students see the same clips with the same masks, so that they share one pass of the teachers."""
    return Pretrain(
        student=student,
        teacher="tiny",
        dataset="motion",
        stride=1,
        mask_ratio=0.75,
        drop_path=0.0,
        optimization=optimization(2, peak_lr=5e-4),
    )


def test_of(size: str) -> Test:
    return Test(size=size, dataset="motion", sampling="dense", stride=1, clips=5, crops=3)


# Lower mask ratios than the paper's, which would leave one or two of the sixteen positions visible.
image_teacher = ImageTeacher(
    size="tiny",
    dataset="motion",
    mask_ratio=0.5,
    crop_scale=(0.5, 1.0),
    flip=0.0,
    optimization=optimization(4, peak_lr=2e-3, batch=32),
)
video_teacher = VideoTeacher(
    size="tiny", dataset="motion", stride=1, mask_ratio=0.5, optimization=optimization(2, peak_lr=2e-3)
)


def distilled(name: str, student: str, target: Target | None = None) -> Row:
    return Row(
        name=name,
        teachers="train",
        image_teacher=image_teacher,
        video_teacher=video_teacher,
        pretrain=pretrain_of(student),
        finetune=finetune_of(student),
        test=test_of(student),
        target=target,
    )


rows = (
    distilled("demo", "tiny", Target(top1=70.0, source="floor")),
    Row(name="demo_from_scratch", finetune=finetune_of("tiny"), test=test_of("tiny")),
    distilled("demo_nano", "nano"),
)
