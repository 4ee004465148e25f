"""Mixup and CutMix of clips, with one draw per group of clips."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.data.mixup import mixup_target

from mvd.config import ConfigError


class Mix(NamedTuple):
    """One draw: the weight of a clip's own label, and the CutMix box (low, high, low, high), or None for Mixup."""

    lam: float
    box: tuple[int, int, int, int] | None = None


class ClipMixup:
    """Mixes clip i of a batch with clip N-1-i, and their labels (timm's Mixup in "batch" mode, for clips).

    The box is drawn as in timm 0.4.12, which the official release pins (QUIRKS 2).

    Args:
        cutmix_axes: "spatial" applies the box to rows and columns of every frame. "official" applies it to frames and
            rows, because the official release runs image code on (B, C, T, H, W) (QUIRKS 1).

    Raises:
        ConfigError: an unknown mode or cutmix_axes, or alphas that are negative or both 0.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch"] = "batch",
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        cutmix_axes: Literal["official", "spatial"] = "official",
    ) -> None:
        if mode != "batch":
            raise ConfigError(f'ClipMixup: mode must be "batch", got {mode!r}')
        if cutmix_axes not in ("official", "spatial"):
            raise ConfigError(f'ClipMixup: cutmix_axes must be "official" or "spatial", got {cutmix_axes!r}')
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha + cutmix_alpha == 0:
            raise ConfigError(
                f"ClipMixup: mixup_alpha and cutmix_alpha must be 0 or more, and one of them positive, got "
                f"{mixup_alpha} and {cutmix_alpha}"
            )
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.cutmix_axes = cutmix_axes

    def __call__(
        self, clips: torch.Tensor, labels: torch.Tensor, rng: np.random.RandomState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw once and mix: clips (N, 3, T, H, W) and labels (N,) -> mixed clips, soft targets (N, classes).

        Draws from numpy's global state if `rng` is None.

        Raises:
            ValueError: an odd number of clips.
        """
        return self.apply(clips, labels, self.draw(clips.shape[-2], clips.shape[-1], rng))

    def draw(self, height: int, width: int, rng: np.random.RandomState | None = None) -> Mix:
        """Draw how a group of clips of height x width pixels is mixed."""
        source: Any = np.random if rng is None else rng
        if source.rand() >= self.prob:
            return Mix(1.0)
        cut = self.cutmix_alpha > 0
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            cut = source.rand() < self.switch_prob
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = float(source.beta(alpha, alpha))
        if not cut or lam == 1.0:
            return Mix(lam)
        box = _draw_box(height, width, lam, source)
        area = (box[1] - box[0]) * (box[3] - box[2])
        return Mix(1.0 - area / (height * width), box)

    def apply(self, clips: torch.Tensor, labels: torch.Tensor, mix: Mix) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix with a given draw; the input clips are not modified."""
        if len(clips) % 2:
            raise ValueError(f"clips are mixed in pairs: their number must be even, got {len(clips)}")
        targets = mixup_target(labels, self.num_classes, mix.lam, self.label_smoothing)
        if mix.box is not None:
            a, b, c, d = mix.box
            rectangle = (slice(a, b), slice(c, d))
            cut = (..., *rectangle, slice(None)) if self.cutmix_axes == "official" else (..., *rectangle)
            mixed = clips.clone()
            mixed[cut] = clips.flip(0)[cut]
            return mixed, targets
        if mix.lam == 1.0:
            return clips, targets
        return clips.mul(mix.lam).add_(clips.flip(0).mul_(1.0 - mix.lam)), targets


def _draw_box(height: int, width: int, lam: float, source: Any) -> tuple[int, int, int, int]:
    """A box of about 1 - lam of the area around a uniform centre, clipped to the image: row and column ranges."""
    ratio = np.sqrt(1.0 - lam)
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    row, column = int(source.randint(height)), int(source.randint(width))
    rows = max(row - half_height, 0), min(row + half_height, height)
    columns = max(column - half_width, 0), min(column + half_width, width)
    return *rows, *columns
