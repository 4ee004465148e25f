"""Optimizer and learning rate schedule of a recipe."""

import math
from dataclasses import dataclass, field

from mvd.config.errors import check, check_positive
from mvd.config.fields import NOT_HASHED


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with a cosine schedule after a linear warmup from 0.

    Learning rates are per 256 samples of the global batch, as in the paper; samples are images, clips or, in
    fine-tuning, videos (not their augmented copies). The schedule spans `schedule_epochs` (None: `epochs`), of which
    `epochs` are run: the official release schedules 401 and uses the checkpoint after 400.
    """

    global_batch: int
    epochs: int
    schedule_epochs: int | None = None
    warmup_epochs: float
    base_lr: float
    min_lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.05
    eps: float = 1e-8
    layer_decay: float | None = None
    micro_batch: int = field(metadata=NOT_HASHED)  # official samples per GPU and step, the most that mvd.batch uses

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "epochs", "base_lr"):
            check_positive(f"optimization.{name}", getattr(self, name))
        check(
            self.laid_out_epochs >= self.epochs,
            f"optimization.schedule_epochs must be at least epochs={self.epochs}, got {self.schedule_epochs}",
        )
        check(
            0 <= self.warmup_epochs <= self.laid_out_epochs,
            f"optimization.warmup_epochs must be between 0 and the {self.laid_out_epochs} epochs of the schedule, "
            f"got {self.warmup_epochs}",
        )
        check_positive("optimization.eps", self.eps)
        check(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimization.betas must be at least 0 and below 1, got {self.betas}",
        )
        check(
            0 <= self.weight_decay < math.inf,
            f"optimization.weight_decay must be 0 or a positive number, got {self.weight_decay}",
        )
        check(self.base_lr < math.inf, f"optimization.base_lr must be finite, got {self.base_lr}")
        check(
            0 <= self.min_lr <= self.base_lr,
            f"optimization.min_lr must be between 0 and base_lr={self.base_lr:g}, got {self.min_lr}",
        )
        check(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optimization.layer_decay must be above 0 and at most 1, or null, got {self.layer_decay}",
        )

    @property
    def laid_out_epochs(self) -> int:
        return self.epochs if self.schedule_epochs is None else self.schedule_epochs

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / 256

    @property
    def floor_lr(self) -> float:
        return self.min_lr * self.global_batch / 256
