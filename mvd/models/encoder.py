"""Shared by all networks: patch and tubelet embeddings, transformer blocks, and the image and video encoders.

Under bf16 autocast, matrix products run in bf16, and the float32 position tables keep the residual stream in float32,
as in the official mixed-precision pre-training. A bf16 residual stream would double the error of a ViT-B video
teacher's features (1.0 % instead of 0.5 % of their standard deviation, random weights).
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, calculate_drop_path_rates
from timm.models import beit, vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvd.config.sizes import ClipShape, ImageShape, Transformer
from mvd.models.positions import sincos_2d
from mvd.models.tokens import cut_tubelets, take

layer_norm = partial(nn.LayerNorm, eps=1e-6)

VideoBlock = beit.Block  # biases for query and value only
ImageBlock = vision_transformer.Block  # a bias for query, key and value, as MAE has it


def fixed(table: Tensor) -> nn.Parameter:
    """A position table that is not trained but is in the state dict, as in some official models."""
    return nn.Parameter(table, requires_grad=False)


class TubeletEmbedding(nn.Module):
    """Linear embedding of tubelets; its weight has the shape of official checkpoints, a Conv3d's."""

    def __init__(self, clip: ClipShape, width: int) -> None:
        super().__init__()
        self.clip = clip
        kernel = (clip.tubelet, clip.patch_size, clip.patch_size)
        self.proj = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)

    def forward(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embeds a clip (B, 3, T, S, S) to (B, N, width), or only its visible tokens (B, K) to (B, K, width).

        Raises:
            ValueError: the clip has another shape than this network's.
        """
        expected = (3, self.clip.frames, self.clip.image_size, self.clip.image_size)
        if video.shape[1:] != expected:
            raise ValueError(f"clips must have the shape (batch, *{expected}), got {tuple(video.shape)}")
        tubelets = cut_tubelets(video, self.clip.tubelet, self.clip.patch_size).flatten(2)
        if visible is not None:  # before the projection, so that masked tokens cost nothing
            tubelets = take(tubelets, visible)
        return F.linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)


class Blocks(nn.ModuleList):
    """Pre-norm transformer blocks with fused attention; drop path rises from 0 to its rate over the depth.

    activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        shape: Transformer,
        block: type[nn.Module] = VideoBlock,
        *,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        mlp_ratio = (shape.mlp_width + 0.5) / shape.width  # timm truncates width x ratio
        build = partial(block, shape.width, shape.heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
        super().__init__(build(drop_path=rate) for rate in calculate_drop_path_rates(drop_path, shape.depth))
        self.activation_checkpointing = activation_checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self:
            recomputed = self.activation_checkpointing
            tokens = checkpoint(block, tokens, use_reentrant=False) if recomputed else block(tokens)
        return tokens


class VideoEncoder(nn.Module):
    """The encoder of student, classifier and video teacher. Subclasses apply the final norm, if they do.

    positions: the table (1, N, width), a frozen parameter if the official state dict has it, or else a buffer.
    """

    def __init__(
        self,
        shape: Transformer,
        clip: ClipShape,
        positions: Tensor,
        *,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.pos_embed = positions
        self.patch_embed = TubeletEmbedding(clip, shape.width)
        self.blocks = Blocks(shape, drop_path=drop_path, activation_checkpointing=activation_checkpointing)
        self.norm: nn.Module = layer_norm(shape.width)

    def features(self, video: Tensor, visible: Tensor | None = None) -> Tensor:
        """The last block's tokens of a clip (B, 3, T, S, S), without the norm: (B, N, width).

        With `visible` (B, K), token indices, only these tokens are encoded: (B, K, width).
        """
        tokens: Tensor = self.patch_embed(video, visible)
        positions = self.pos_embed if visible is None else F.embedding(visible, self.pos_embed[0])
        tokens = self.blocks(tokens + positions)
        return tokens


class ImageEncoder(nn.Module):
    """MAE's encoder, that of the image teacher: a class token before the patches, full qkv biases."""

    def __init__(self, shape: Transformer, image: ImageShape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = fixed(sincos_2d(shape.width, image.side, class_token=True))
        self.patch_embed = PatchEmbed(image.image_size, image.patch_size, 3, shape.width)
        self.blocks = Blocks(shape, ImageBlock)
        self.norm = layer_norm(shape.width)

    def features(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The last block's tokens of images (B, 3, S, S), without the norm: (B, 1 + N, width), class token first.

        With `visible` (B, K), patch indices, only these patches are encoded: (B, 1 + K, width).
        """
        tokens: Tensor = self.patch_embed(images) + self.pos_embed[:, 1:]
        if visible is not None:
            tokens = take(tokens, visible)
        class_token = self.cls_token + self.pos_embed[:, :1]
        tokens = self.blocks(torch.cat([class_token.expand(len(tokens), -1, -1), tokens], dim=1))
        return tokens


def init_transformer(module: nn.Module) -> None:
    """For `apply`: Xavier-uniform linear weights and zero biases; convolutions keep PyTorch's default (QUIRKS 25)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
