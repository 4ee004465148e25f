"""ViT-S distilled from ViT-B teachers for 400 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITS_FROM_VITB, finetuning, multi_view_test
from experiments.teachers import mae_vitb, videomae_vitb
from mvd.config import Row, Target

row = Row(
    name="vits_from_vitb_ssv2",
    image_teacher=mae_vitb.row.image_teacher,
    video_teacher=videomae_vitb.row.video_teacher,
    pretrain=VITS_FROM_VITB,
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
    target=Target(top1=70.7, top5=92.6),
)
