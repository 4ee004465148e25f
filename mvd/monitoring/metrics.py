"""A run's metrics, passed on to all of its writers (mvd.monitoring.writers)."""

import dataclasses
import json
import logging
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from mvd.config import TrainRecipe
from mvd.distributed.process import Process
from mvd.flops import throughput
from mvd.identity import identity
from mvd.monitoring.writers import Writer, build_writers
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

logger = logging.getLogger(__name__)


class Metrics:
    """Writes on the first process only; on the others every method does nothing.

    A resumed run drops what was written after its checkpoint, so that no curve has an update twice. A full or
    read-only disk does not stop a run: the failure is logged, and writing is tried again at the next call.
    """

    def __init__(self, files: RunDirectory, writers: Sequence[Writer]) -> None:
        """writers: empty on a process that writes nothing."""
        self.files = files
        self.writers = [_Tolerant(writer, files) for writer in writers]
        self.flush()

    @classmethod
    def of_stage(cls, stage: Stage, process: Process, resumed_at: int) -> "Metrics":
        """The metrics of a stage that continues after update `resumed_at`, with its settings as text and as values."""
        metrics = cls(stage.files, build_writers(stage, resumed_at) if process.is_first else [])
        for name, settings in (("1_recipe", stage.recipe), ("3_execution", stage.execution)):
            yaml = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))
            metrics.text(max(resumed_at, 0), name, f"{stage.id}\n```yaml\n{yaml}```")
        if rows := _rows(stage.files):
            metrics.text(max(resumed_at, 0), "2_rows", rows)
        metrics.hyperparameters({"kind": stage.kind, **_flat(identity(stage.recipe))})
        return metrics

    def write(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        """Adds one record; `epoch` counts from 1 and is the one that `update` belongs to."""
        self._each(lambda writer: writer.scalars(update, epoch, values))

    def image(self, update: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Adds an image; pixels: (H, W, 3), RGB."""
        self._each(lambda writer: writer.image(update, name, pixels))

    def text(self, update: int, name: str, markdown: str) -> None:
        """Adds a text."""
        self._each(lambda writer: writer.text(update, name, markdown))

    def hyperparameters(self, values: Mapping[str, str | float | bool]) -> None:
        """Records the settings of the run, by which a tool can compare it with others."""
        self._each(lambda writer: writer.hyperparameters(values))

    def latest(self) -> dict[str, float]:
        """The last value of each metric, from earlier attempts too; {} on the other processes."""
        values: dict[str, float] = {}
        for record in self._records():
            values |= record
        return values

    def newest(self, name: str) -> int:
        """The last update with this metric; 0 if there is none, and on the other processes."""
        return max((record["update"] for record in self._records() if name in record), default=0)

    def flush(self) -> None:
        """Flushes buffered metrics."""
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
                name = type(self.writer).__name__
                logger.error("FAULT (log): %s cannot write the metrics of %s: %s", name, self.files.path, error)
            self.is_open, self.failing = False, True


def _rows(files: RunDirectory) -> str:
    """The rows of a stage with their targets, and in what they differ from the paper, as Markdown; "" if unknown."""
    try:
        noted = json.loads(files.rows.read_text(encoding="utf-8"))
        lines = [
            f"- **{name}**: target {_target(row['target'])}; {row['differs'] or 'no field differs'}"
            for name, row in noted.items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""  # the launcher writes the file; a run started without it has none
    return "\n".join(lines)


def _target(target: Mapping[str, Any] | None) -> str:
    return "none" if target is None else f"top-1 {target['top1']} % ({target['source']})"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Nested settings as one level, with names such as `optimization.base_lr`."""
    values: dict[str, str | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value if isinstance(value, str | float | bool) else str(value)
    return values


def gpu_throughput(recipe: TrainRecipe, samples_per_second: float, process: Process) -> dict[str, float]:
    """TFLOP/s per GPU and MFU (mvd.flops); {} on a CPU."""
    if process.device.type != "cuda":
        return {}
    return throughput(recipe, samples_per_second, process.world_size, torch.cuda.get_device_name(process.device))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: of the GPU, or else of RAM, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
