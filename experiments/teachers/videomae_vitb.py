"""The ViT-B video teacher: a masked autoencoder (VideoMAE) on Kinetics-400."""

from experiments.recipes import masked_clips
from mvd.config import Row

row = Row(
    name="videomae_vitb",
    teachers="train",
    video_teacher=masked_clips("base", global_batch=2048, micro_batch=32),
)
