"""The ViT-L image teacher: a masked autoencoder (MAE) on ImageNet-1K."""

from experiments.recipes import masked_images
from mvd.config import Row

row = Row(name="mae_vitl", teachers="train", image_teacher=masked_images("large", micro_batch=64))
