"""ViT-H distilled from ViT-H teachers for 800 epochs, fine-tuned on Kinetics-400."""

from experiments.recipes import VITH_E800, finetuning, multi_view_test
from experiments.teachers import mae_vith, videomae_vith
from mvd.config import Row, Target

row = Row(
    name="vith_k400",
    image_teacher=mae_vith.row.image_teacher,
    video_teacher=videomae_vith.row.video_teacher,
    pretrain=VITH_E800,
    finetune=finetuning(
        "huge",
        "k400",
        epochs=50,
        base_lr=1e-3,
        global_batch=256,
        micro_batch=8,
        drop_path=0.3,
        head_dropout=0.5,
        activation_checkpointing=True,
    ),
    test=multi_view_test("huge", "k400"),
    target=Target(top1=87.3, top5=97.4),
)
