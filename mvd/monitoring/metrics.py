"""A run's numbers, handed to all of its writers (mvd.monitoring.writers)."""

import logging
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mvd.distributed.process import Process
from mvd.monitoring.writers import Writer, build_writers
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

logger = logging.getLogger(__name__)


class Metrics:
    """Writes on the first process only; on the others every method does nothing.

    A resumed run drops what was written after its checkpoint, so that no curve shows an update twice. A disk that is
    full or read-only does not stop a run: the failure is logged, and writing is tried again at the next call.
    """

    def __init__(self, files: RunDirectory, writers: Sequence[Writer]) -> None:
        """writers: empty on a process that writes nothing."""
        self.files = files
        self.writers = [_Tolerant(writer, files) for writer in writers]
        self.flush()

    @classmethod
    def of_stage(cls, stage: Stage, process: Process, resumed_at: int) -> "Metrics":
        """The metrics of a stage that goes on after update `resumed_at`."""
        return cls(stage.files, build_writers(stage, resumed_at) if process.is_first else [])

    def write(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds one record; `epoch` counts from 1 and is the one that `update` belongs to."""
        self._each(lambda writer: writer.scalars(update, epoch, values))

    def latest(self) -> dict[str, float]:
        """Each number's last value, from earlier attempts too; {} on the other processes."""
        values: dict[str, float] = {}
        for record in self._records():
            values |= record
        return values

    def newest(self, name: str) -> int:
        """The last update that has this number; 0 if none has, and on the other processes."""
        return max((record["update"] for record in self._records() if name in record), default=0)

    def flush(self) -> None:
        """Flush buffered metrics."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _records(self) -> list[dict[str, Any]]:
        return self.files.read_metrics() if self.writers else []

    def _each(self, action: Callable[[Writer], None]) -> None:
        for writer in self.writers:
            writer.do(action)


class _Tolerant:
    """A writer whose failures are logged, once per outage."""

    def __init__(self, writer: Writer, files: RunDirectory) -> None:
        self.writer, self.files = writer, files
        self.is_open = self.failing = False

    def do(self, action: Callable[[Writer], None]) -> None:
        try:
            if not self.is_open:
                self.writer.open()
                self.is_open = True
            action(self.writer)
            self.failing = False
        except OSError as error:
            if not self.failing:
                logger.error("FAULT (log): %s cannot be written: %s", self.files.path, error)
            self.is_open, self.failing = False, True


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or else in RAM, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
