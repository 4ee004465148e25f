"""ViT-H distilled from ViT-H teachers for 800 epochs, fine-tuned on Something-Something V2."""

from experiments.recipes import VITH_E800, finetuning, multi_view_test
from experiments.teachers import mae_vith, videomae_vith
from mvd.config import Row, Target

row = Row(
    name="vith_ssv2",
    image_teacher=mae_vith.row.image_teacher,
    video_teacher=videomae_vith.row.video_teacher,
    pretrain=VITH_E800,
    finetune=finetuning(
        "huge",
        "ssv2",
        epochs=30,
        base_lr=5e-4,
        global_batch=128,
        micro_batch=8,
        min_lr=1e-5,
        drop_path=0.3,
        head_dropout=0.5,
        activation_checkpointing=True,
    ),
    test=multi_view_test("huge", "ssv2"),
    target=Target(top1=77.3, top5=95.7),
)
