"""The ViT-B image teacher: a masked autoencoder (MAE) on ImageNet-1K."""

from experiments.recipes import masked_images
from mvd.config import Row

row = Row(name="mae_vitb", teachers="train", image_teacher=masked_images("base", micro_batch=64))
