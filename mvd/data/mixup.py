"""Mixup and CutMix of clips, one draw for a group of clips."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.data.mixup import mixup_target

from mvd.config import ConfigError


class Mix(NamedTuple):
    """One draw: the weight of a clip's own label, and the box (low, high, low, high) to cut, or None for Mixup."""

    lam: float
    box: tuple[int, int, int, int] | None = None


class ClipMixup:
    """Mixes clip i of a batch with clip N-1-i, and their labels (timm's Mixup in "batch" mode, for clips).

    The box is timm 0.4.12's, which the official release pins (QUIRKS 2). With cutmix_axes "official" the box, drawn
    for rows and columns, cuts frames and rows, because that release applies image code to (B, C, T, H, W) (QUIRKS 1);
    "spatial" cuts rows and columns of every frame.
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
            raise ConfigError(f'ClipMixup: mode {mode!r} does not exist for clips; use "batch"')
        if cutmix_axes not in ("official", "spatial"):
            raise ConfigError(f'ClipMixup: cutmix_axes is {cutmix_axes!r}; use "official" or "spatial"')
        if mixup_alpha < 0 or cutmix_alpha < 0 or mixup_alpha + cutmix_alpha == 0:
            raise ConfigError(f"ClipMixup: alphas {mixup_alpha} and {cutmix_alpha} mix nothing; make one positive")
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
        """Draws once and mixes: clips (N, 3, T, H, W) and labels (N,) -> mixed clips, soft targets (N, classes).

        Draws from numpy's global state where no `rng` is given.

        Raises:
            ValueError: an odd number of clips.
        """
        return self.apply(clips, labels, self.draw(clips.shape[-2], clips.shape[-1], rng))

    def draw(self, height: int, width: int, rng: np.random.RandomState | None = None) -> Mix:
        """Draws how a group of clips of height x width pixels is mixed."""
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
        """Mixes with a given draw; the clips that come in stay as they are."""
        if len(clips) % 2:
            raise ValueError(f"{len(clips)} clips cannot be mixed in pairs; give an even number")
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
    """Rows and columns of a box of about 1 - lam of the area around a uniform centre, clipped to the image."""
    ratio = np.sqrt(1.0 - lam)
    half_height, half_width = int(height * ratio) // 2, int(width * ratio) // 2
    row, column = int(source.randint(height)), int(source.randint(width))
    rows = max(row - half_height, 0), min(row + half_height, height)
    columns = max(column - half_width, 0), min(column + half_width, width)
    return *rows, *columns
