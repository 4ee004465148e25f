"""ViT-B distilled from ViT-L teachers for 400 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITB_FROM_VITL, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vitb_from_vitl_ssv2",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITB_FROM_VITL,
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
    target=Target(top1=73.7, top5=94.0),
)
