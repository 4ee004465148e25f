"""ViT-S distilled from ViT-B teachers for 400 epochs, fine-tuned on Kinetics-400."""

from experiments.recipes import VITS_FROM_VITB, finetuning, multi_view_test
from experiments.teachers import mae_vitb, videomae_vitb
from mvd.config import Row, Target

row = Row(
    name="vits_from_vitb_k400",
    image_teacher=mae_vitb.row.image_teacher,
    video_teacher=videomae_vitb.row.video_teacher,
    pretrain=VITS_FROM_VITB,
    finetune=finetuning(
        "small",
        "k400",
        epochs=150,
        base_lr=5e-4,
        global_batch=384,
        micro_batch=12,
    ),
    test=multi_view_test("small", "k400"),
    target=Target(top1=80.6, top5=94.7),
)
