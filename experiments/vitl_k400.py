"""ViT-L distilled from ViT-L teachers for 400 epochs, fine-tuned on Kinetics-400."""

from experiments.recipes import VITL_E400, finetuning, multi_view_test
from experiments.teachers import mae_vitl, videomae_vitl
from mvd.config import Row, Target

row = Row(
    name="vitl_k400",
    image_teacher=mae_vitl.row.image_teacher,
    video_teacher=videomae_vitl.row.video_teacher,
    pretrain=VITL_E400,
    finetune=finetuning(
        "large",
        "k400",
        epochs=50,
        base_lr=1e-3,
        global_batch=512,
        micro_batch=2,
        drop_path=0.3,
        head_dropout=0.5,
    ),
    test=multi_view_test("large", "k400"),
    target=Target(top1=86.0, top5=96.9),
)
