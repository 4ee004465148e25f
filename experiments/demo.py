"""The whole method in small: every stage, on a generated data set of eight motions, in minutes on two CPU cores.

`demo` trains both teachers, distils a student from them, fine-tunes and tests it; `demo_from_scratch` fine-tunes the
same network with the same budget from random weights, which shows what the distillation bought.
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

BATCH = 64
MICRO_BATCH = 32


def self_supervised(epochs: int) -> Optimization:
    return Optimization(
        global_batch=BATCH,
        epochs=epochs,
        warmup_epochs=1,
        base_lr=4e-3,
        min_lr=4e-5,
        betas=(0.9, 0.95),
        micro_batch=MICRO_BATCH,
    )


finetune = Finetune(
    size="tiny",
    dataset="motion",
    sampling="dense",
    stride=1,
    drop_path=0.0,
    # No flip and no RandAugment: a mirrored "left" is a "right", and a sheared clip moves another way.
    augmentation=Augmentation(auto=None, crop_scale=(0.7, 1.0), flip=0.0, erase=0.0, samples=1),
    mixing=Mixing(mixup=0.1, cutmix=0.0, group=8),
    optimization=Optimization(
        global_batch=BATCH,
        epochs=6,
        warmup_epochs=1,
        base_lr=4e-3,
        min_lr=4e-5,
        betas=(0.9, 0.999),
        micro_batch=MICRO_BATCH,
    ),
)
test = Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=5, crops=3)

rows = (
    Row(
        name="demo",
        teachers="train",
        image_teacher=ImageTeacher(size="tiny", dataset="motion", flip=0.0, optimization=self_supervised(4)),
        video_teacher=VideoTeacher(size="tiny", dataset="motion", stride=1, optimization=self_supervised(8)),
        pretrain=Pretrain(
            student="tiny", teacher="tiny", dataset="motion", stride=1, drop_path=0.0, optimization=self_supervised(8)
        ),
        finetune=finetune,
        test=test,
        target=Target(top1=70.0, source="floor"),
    ),
    Row(name="demo_from_scratch", finetune=finetune, test=test),
)
