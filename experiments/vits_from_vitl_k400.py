"""ViT-S distilled from ViT-L teachers for 400 epochs, fine-tuned on Kinetics-400."""

from experiments.recipes import VITS_FROM_VITL, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vits_from_vitl_k400",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITS_FROM_VITL,
    finetune=finetuning(
        "small",
        "k400",
        epochs=150,
        base_lr=5e-4,
        global_batch=384,
        micro_batch=12,
    ),
    test=multi_view_test("small", "k400"),
    target=Target(top1=81.0, top5=94.8),
)
