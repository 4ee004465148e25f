"""ViT-L distilled from ViT-L teachers for 800 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITL_E800, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vitl_e800_ssv2",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITL_E800,
    finetune=finetuning(
        "large",
        "ssv2",
        epochs=30,
        base_lr=5e-4,
        global_batch=256,
        micro_batch=16,
        drop_path=0.3,
        head_dropout=0.5,
        activation_checkpointing=True,
    ),
    test=multi_view_test("large", "ssv2"),
    target=Target(top1=76.7, top5=95.5),
)
