"""Settings of a run that do not change its result: shared by the cluster profile and a stage's execution."""

from dataclasses import dataclass
from typing import Literal

from mvd.config.errors import check, check_positive

Precision = Literal["bf16", "fp32"]
Reader = Literal["pyav", "decord"]

ALWAYS_TOLERATED = 10  # unreadable files, whatever their share: so few do not indicate a disk problem


@dataclass(frozen=True, kw_only=True)
class DatasetPaths:
    """Paths of a data set: its root folder, and its annotation files, relative to the root or absolute."""

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
    slow_factor: float | None = 1.3
    avoid_slow: bool = False
    compare_every: int = 100
    audit_every: int = 500

    def __post_init__(self) -> None:
        positive = ("save_failures", "save_again_seconds", "bad_updates", "hang_minutes", "rendezvous_minutes")
        for name in (*positive, "video_seconds"):
            check_positive(f"faults.{name}", getattr(self, name))
        for name in ("compare_every", "audit_every"):
            check(getattr(self, name) >= 0, f"faults.{name} must be 0 (never) or more, got {getattr(self, name)}")
        for name in ("spike_factor", "slow_factor"):
            factor = getattr(self, name)
            check(factor is None or factor > 1, f"faults.{name} must be above 1, or null, got {factor}")
        check(
            0 <= self.unreadable_share <= 1,
            f"faults.unreadable_share must be between 0 and 1, got {self.unreadable_share}",
        )

    def too_many_unreadable(self, unreadable: int, files: int) -> bool:
        """Whether so many of the files cannot be read that the run must end.

        More than `unreadable_share` of them, and more than ten, or than half of a list of fewer than twenty.
        """
        return unreadable > max(self.unreadable_share * files, min(ALWAYS_TOLERATED, files // 2))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of all runs in the cluster profile; each becomes a field of a stage's execution too.

    compile: whether transformer blocks are compiled in training; null for on GPUs only.
    reader: video decoder. workers: loader processes per training process; 0 loads in the training process.
    checkpoint_every: updates between checkpoints; checkpoint_minutes: minutes between them; null turns either off.
    keep_checkpoints: number of newest checkpoints to keep; keep_every_epochs: interval of those kept permanently, null
    for none. validate_every: epochs between validations. probe_every: epochs between k-NN probes in pre-training,
    0 for never. log_every: updates between reports.
    """

    compile: bool | None = None
    reader: Reader = "pyav"
    workers: int = 16
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 15.0
    keep_checkpoints: int = 2
    keep_every_epochs: int | None = None
    faults: Faults = Faults()
    validate_every: int = 5
    probe_every: int = 10
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("keep_checkpoints", "validate_every", "log_every"):
            check_positive(name, getattr(self, name))
        for name in ("checkpoint_every", "checkpoint_minutes", "keep_every_epochs"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check(self.probe_every >= 0, f"probe_every must be 0 (never) or more, got {self.probe_every}")
        check(self.workers >= 0, f"workers must be 0 (load in the training process) or more, got {self.workers}")
