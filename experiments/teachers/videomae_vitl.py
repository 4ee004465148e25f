"""The ViT-L video teacher: a masked autoencoder (VideoMAE) on Kinetics-400."""

from experiments.recipes import masked_clips
from mvd.config import Row

row = Row(
    name="videomae_vitl",
    teachers="train",
    video_teacher=masked_clips("large", global_batch=512, micro_batch=16),
)
