"""ViT-S distilled from ViT-L teachers for 400 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITS_FROM_VITL, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vits_from_vitl_ssv2",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITS_FROM_VITL,
    finetune=finetuning(
        "small",
        "ssv2",
        epochs=40,
        base_lr=1e-3,
        global_batch=384,
        micro_batch=12,
        layer_decay=0.7,
    ),
    test=multi_view_test("small", "ssv2"),
    target=Target(top1=70.9, top5=92.8),
)
