"""The classifier: a pre-trained encoder with a head, for fine-tuning and testing."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mvd.config.sizes import Size, size
from mvd.models.encoder import VideoEncoder, layer_norm
from mvd.models.positions import sincos_3d


class Classifier(VideoEncoder):
    """Encoder, mean over all tokens, norm, dropout, linear head; no norm before the mean."""

    def __init__(
        self, own: Size, num_classes: int, *, drop_path: float, head_dropout: float, activation_checkpointing: bool
    ) -> None:
        clip, width = own.clip, own.encoder.width
        positions = nn.Buffer(sincos_3d(width, clip.slices, clip.side), persistent=False)
        super().__init__(
            own.encoder, clip, positions, drop_path=drop_path, activation_checkpointing=activation_checkpointing
        )
        self.norm = nn.Identity()
        self.fc_norm = layer_norm(width)
        self.head_dropout = nn.Dropout(head_dropout)
        self.apply(_init_linear)
        self.head: nn.Module = new_head(width, num_classes)

    def pooled(self, video: Tensor) -> Tensor:
        """Clips (B, 3, T, S, S), normalised -> the mean token after the norm, (B, width)."""
        pooled: Tensor = self.fc_norm(self.features(video).mean(dim=1))
        return pooled

    def forward(self, video: Tensor) -> Tensor:
        """Clips (B, 3, T, S, S), normalised -> logits (B, classes)."""
        logits: Tensor = self.head(self.head_dropout(self.pooled(video)))
        return logits


def build_classifier(
    name: str,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    head_dropout: float = 0.0,
    activation_checkpointing: bool = False,
) -> Classifier:
    """A classifier of this size (mvd.config.sizes), randomly initialised from torch's global generator."""
    return Classifier(
        size(name),
        num_classes,
        drop_path=drop_path,
        head_dropout=head_dropout,
        activation_checkpointing=activation_checkpointing,
    )


def new_head(width: int, num_classes: int) -> nn.Linear:
    """A linear head with initial weights of 0.001 times those of the other layers."""
    head = nn.Linear(width, num_classes)
    _init_linear(head)
    with torch.no_grad():
        head.weight.mul_(0.001)
    return head


def _init_linear(module: nn.Module) -> None:
    """Truncated normal linear weights, zero biases; the tubelet embedding keeps PyTorch's default (QUIRKS 25)."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
