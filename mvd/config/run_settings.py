"""How a run behaves, whatever it computes: settings that the cluster profile and a stage's execution share."""

from dataclasses import dataclass
from typing import Literal

from mvd.config.errors import check, check_positive

Precision = Literal["bf16", "fp32"]
Reader = Literal["pyav", "decord"]


@dataclass(frozen=True, kw_only=True)
class DatasetPaths:
    """Where a data set is: its root folder, and its annotation files, relative to the root or absolute."""

    root: str
    train: str = "train.csv"
    val: str = "val.csv"
    test: str = "test.csv"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Fault tolerance limits of a run (cluster.example.yaml explains each)."""

    save_failures: int = 5
    save_again_seconds: float = 300.0
    bad_updates: int = 3
    spike_factor: float | None = 3.0
    spike_rollback: bool = False
    hang_minutes: float = 15.0
    rendezvous_minutes: float = 5.0
    video_seconds: float = 120.0
    unreadable_share: float = 0.02

    def __post_init__(self) -> None:
        positive = ("save_failures", "save_again_seconds", "bad_updates", "hang_minutes", "rendezvous_minutes")
        for name in (*positive, "video_seconds"):
            check_positive(f"faults.{name}", getattr(self, name))
        check(
            self.spike_factor is None or self.spike_factor > 1,
            f"faults.spike_factor must be above 1, or null, got {self.spike_factor}",
        )
        check(
            0 <= self.unreadable_share <= 1,
            f"faults.unreadable_share must be between 0 and 1, got {self.unreadable_share}",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a person can set in the cluster profile about every run; a stage's execution carries the same fields.

    reader: decoder of videos. workers: loader processes of one training process, 0 to load in that process.
    checkpoint_every: updates between checkpoints; checkpoint_minutes: minutes between them; null for never.
    keep_checkpoints: how many of the newest are kept; keep_every_epochs: which are kept for good, null for none.
    validate_every: epochs between validations. log_every: updates between reports.
    """

    reader: Reader = "pyav"
    workers: int = 8
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 15.0
    keep_checkpoints: int = 2
    keep_every_epochs: int | None = None
    faults: Faults = Faults()
    validate_every: int = 5
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("keep_checkpoints", "validate_every", "log_every"):
            check_positive(name, getattr(self, name))
        for name in ("checkpoint_every", "checkpoint_minutes", "keep_every_epochs"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check(self.workers >= 0, f"workers must be 0 (load in the training process) or more, got {self.workers}")
