"""The ViT-H video teacher: a masked autoencoder (VideoMAE) on Kinetics-400."""

from experiments.recipes import masked_clips
from mvd.config import Row

row = Row(
    name="videomae_vith",
    teachers="train",
    video_teacher=masked_clips("huge", global_batch=1024, micro_batch=8),
)
