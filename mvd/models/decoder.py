"""The decoder of the student's two branches and of VideoMAE."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mvd.config.sizes import Transformer
from mvd.models.encoder import Blocks, layer_norm


class Decoder(nn.Module):
    """Blocks over all tokens, then norm and a linear head on the masked ones."""

    def __init__(
        self, shape: Transformer, outputs: int, *, drop_path: float = 0.0, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.blocks = Blocks(shape, drop_path=drop_path, activation_checkpointing=activation_checkpointing)
        self.norm = layer_norm(shape.width)
        self.head = nn.Linear(shape.width, outputs)

    def forward(self, tokens: Tensor, masked: int) -> Tensor:
        """Tokens (B, N, width), of which the last `masked` are the masked ones -> predictions (B, masked, outputs)."""
        outputs: Tensor = self.head(self.norm(self.blocks(tokens)[:, -masked:]))
        return outputs


def mask_token(width: int) -> nn.Parameter:
    """A mask token from a normal distribution truncated at one standard deviation, +-0.02 (QUIRKS 24)."""
    return nn.Parameter(trunc_normal_(torch.empty(1, 1, width), std=0.02, a=-0.02, b=0.02))


def append_mask_tokens(visible: Tensor, token: Tensor, positions: Tensor, order: Tensor) -> Tensor:
    """Completes visible tokens (B, V, D) with mask tokens and adds the position table to both.

    token: (1, 1, D). positions: (1, N, D). order: (B, N), the visible tokens' indices, then the masked ones'.
    Returns (B, N, D) in that order.
    """
    batch, count, _ = visible.shape
    mask_tokens = token.expand(batch, order.shape[1] - count, -1)
    return torch.cat([visible, mask_tokens], dim=1) + F.embedding(order, positions[0])
