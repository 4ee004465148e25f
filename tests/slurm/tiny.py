"""Two rows of the tiny size that share one pre-training, each stage a dozen updates of the small motion data set."""

from experiments.demo import optimization
from mvd.config import Augmentation, Finetune, ImageTeacher, Mixing, Pretrain, Row, Target, Test, VideoTeacher

finetunes = [
    Finetune(
        size="tiny",
        dataset="motion",
        sampling="dense",
        stride=1,
        drop_path=0.0,
        augmentation=Augmentation(auto=None, crop_scale=(0.7, 1.0), flip=0.0, erase=0.0, samples=1),
        mixing=Mixing(group=8),
        optimization=optimization(2, peak_lr=3e-3, batch=8),
        seed=seed,
    )
    for seed in (0, 1)
]

rows = tuple(
    Row(
        name=f"tiny_{name}",
        image_teacher=ImageTeacher(size="tiny", dataset="motion", optimization=optimization(1, peak_lr=1e-3)),
        video_teacher=VideoTeacher(size="tiny", dataset="motion", stride=1, optimization=optimization(1, peak_lr=1e-3)),
        pretrain=Pretrain(
            student="tiny",
            teacher="tiny",
            dataset="motion",
            stride=1,
            mask_ratio=0.75,
            drop_path=0.0,
            optimization=optimization(2, peak_lr=5e-4, batch=8),
        ),
        finetune=finetune,
        test=Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=2, crops=1),
        target=Target(top1=1.0, source="floor"),
    )
    for name, finetune in zip("ab", finetunes, strict=True)
)
