"""ViT-B distilled from ViT-L teachers for 400 epochs, fine-tuned on Kinetics-400."""

from experiments.recipes import VITB_FROM_VITL, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vitb_from_vitl_k400",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITB_FROM_VITL,
    finetune=finetuning(
        "base",
        "k400",
        epochs=75,
        base_lr=5e-4,
        global_batch=384,
        micro_batch=6,
    ),
    test=multi_view_test("base", "k400"),
    target=Target(top1=83.4, top5=95.8),
)
