"""The whole method at small scale: every stage, on a generated data set of eight motions, in minutes on two CPU cores.

`demo` trains both teachers, distils a student from them, fine-tunes and tests it; `demo_from_scratch` fine-tunes the
same network with the same budget from random weights. That is too little training for distillation to help: benchmarks/
demo.py compares both with a student that was not trained. `demo_nano` is `demo` with a smaller student; both students
see the same clips with the same masks, so they share one pass of the teachers.
"""

import dataclasses

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


finetune = Finetune(
    size="tiny",
    dataset="motion",
    sampling="dense",
    stride=1,
    drop_path=0.0,
    # No flip and no RandAugment: a mirrored "left" is a "right", and shearing changes the direction of motion.
    augmentation=Augmentation(auto=None, crop_scale=(0.7, 1.0), flip=0.0, erase=0.0, samples=1),
    mixing=Mixing(mixup=0.1, cutmix=0.0, group=8),
    optimization=optimization(5, peak_lr=3e-3),
)
test = Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=5, crops=3)

pretrain = Pretrain(
    student="tiny",
    teacher="tiny",
    dataset="motion",
    stride=1,
    mask_ratio=0.75,
    drop_path=0.0,
    optimization=optimization(2, peak_lr=5e-4),
)

demo = Row(
    name="demo",
    teachers="train",
    # Lower mask ratios than the paper's, which would leave one or two of the sixteen positions visible.
    image_teacher=ImageTeacher(
        size="tiny",
        dataset="motion",
        mask_ratio=0.5,
        crop_scale=(0.5, 1.0),
        flip=0.0,
        optimization=optimization(4, peak_lr=2e-3, batch=32),
    ),
    video_teacher=VideoTeacher(
        size="tiny", dataset="motion", stride=1, mask_ratio=0.5, optimization=optimization(2, peak_lr=2e-3)
    ),
    pretrain=pretrain,
    finetune=finetune,
    test=test,
    target=Target(top1=70.0, source="floor"),
)

rows = (
    demo,
    Row(name="demo_from_scratch", finetune=finetune, test=test),
    dataclasses.replace(
        demo,
        name="demo_nano",
        pretrain=dataclasses.replace(pretrain, student="nano"),
        finetune=dataclasses.replace(finetune, size="nano"),
        test=dataclasses.replace(test, size="nano"),
        target=None,
    ),
)
