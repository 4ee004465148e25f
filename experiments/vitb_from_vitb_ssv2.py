"""ViT-B distilled from ViT-B teachers for 400 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITB_FROM_VITB, finetuning, multi_view_test
from experiments.teachers import mae_vitb, videomae_vitb
from mvd.config import Row, Target

row = Row(
    name="vitb_from_vitb_ssv2",
    image_teacher=mae_vitb.row.image_teacher,
    video_teacher=videomae_vitb.row.video_teacher,
    pretrain=VITB_FROM_VITB,
    finetune=finetuning(
        "base",
        "ssv2",
        epochs=30,
        base_lr=5e-4,
        global_batch=384,
        micro_batch=24,
        activation_checkpointing=True,
    ),
    test=multi_view_test("base", "ssv2"),
    target=Target(top1=72.5, top5=93.6),
)
