"""The files of a run directory: their names, and how those that several packages share are read and written.

Must not import torch: the launcher reads run directories too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mvd.config import ConfigError
from mvd.files import append_text, read_json_lines, write_json

CHECKPOINTS = "step-" + 8 * "[0-9]"  # not a copy that somebody has put beside them, such as step-00001000.bak
EVENTS = "events.out.tfevents.*"
MANIFEST = "manifest.json"  # written last: a checkpoint without it is incomplete


@dataclass(frozen=True)
class RunDirectory:
    """The folder of a stage, or of one shard of a test. It has all the state of the stage."""

    path: Path

    @property
    def stage(self) -> Path:
        """The resolved settings (mvd.stage.Stage)."""
        return self.path / "stage.yaml"

    @property
    def provenance(self) -> Path:
        """One entry per attempt (mvd.provenance)."""
        return self.path / "provenance.json"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint (mvd.train.checkpoint_writer)."""
        return self.path / "checkpoints"

    @property
    def faults(self) -> Path:
        """One JSON line per fault (mvd.distributed.faults)."""
        return self.path / "faults.jsonl"

    @property
    def skipped(self) -> Path:
        """Updates skipped because their loss was repeatedly non-finite (mvd.train.bad_updates)."""
        return self.path / "skipped.json"

    @property
    def flight_recorder(self) -> Path:
        """What each rank's last collectives were when the run hung (mvd.distributed.watchdog)."""
        return self.path / "flight_recorder"

    @property
    def compile_cache(self) -> Path:
        """What torch.compile has compiled (mvd.train.compilation)."""
        return self.path / "compile_cache.bin"

    @property
    def metrics(self) -> Path:
        """The curves as JSON lines (mvd.monitoring)."""
        return self.path / "metrics.jsonl"

    def events(self) -> list[Path]:
        """The curves as TensorBoard events, one file per attempt (mvd.monitoring)."""
        return sorted(self.path.glob(EVENTS))

    def older_events(self) -> list[Path]:
        """The events that earlier versions wrote, in a folder of their own."""
        return sorted(self.path.glob(f"tensorboard/{EVENTS}"))

    @property
    def unreadable(self) -> Path:
        """Training files that could not be read, one path per line (mvd.train.skipped_files)."""
        return self.path / "unreadable.txt"

    @property
    def timed_out(self) -> Path:
        """Files that timed out, each with the number of attempts it has ended (mvd.data.video.read_timeout)."""
        return self.path / "hanging.txt"

    @property
    def weights(self) -> Path:
        """Final weights of a training stage, in the official layout."""
        return self.path / "weights.safetensors"

    @property
    def classes(self) -> Path:
        """The class names of a fine-tuning or test, a JSON list (mvd.data.class_names)."""
        return self.path / "classes.json"

    @property
    def result(self) -> Path:
        """The result; written last, when the stage is complete."""
        return self.path / "result.json"

    @property
    def job(self) -> Path:
        """The submission and its attempts (launch.job.record)."""
        return self.path / "job.json"

    @property
    def rows(self) -> Path:
        """The rows that the stage was run for, their targets and what they change (launch.plan.differences)."""
        return self.path / "rows.json"

    @property
    def owner(self) -> Path:
        """The attempt that writes to this folder now (mvd.owner)."""
        return self.path / "owner.json"

    @property
    def cancelled(self) -> Path:
        """The submission whose job goes on without this stage, which was cancelled (launch.job.record)."""
        return self.path / "cancelled.txt"

    @property
    def error(self) -> Path:
        """The error of the first process that failed in the current attempt (launch.job.stage_job)."""
        return self.path / "error.json"

    def logits(self, rank: int) -> Path:
        """The logits of one process of a test (mvd.evaluation.logits)."""
        return self.path / "logits" / f"rank-{rank:04d}.npz"

    def shard(self, shard: int, shards: int) -> "RunDirectory":
        """The folder of one shard of a test."""
        return RunDirectory(self.path / "shards" / f"{shard:04d}-of-{shards:04d}")

    @property
    def whole(self) -> "RunDirectory":
        """The folder of the whole stage, if this is a shard's; otherwise this one."""
        return RunDirectory(self.path.parents[1]) if self.path.parent.name == "shards" else self

    def job_files(self) -> list["RunDirectory"]:
        """The folders with the newest submission's job.json: this one or one per shard; this one if there is none."""
        groups = {"": [self]} if self.job.exists() else {}
        for path in sorted(self.path.glob(f"shards/*/{self.job.name}")):
            groups.setdefault(path.parent.name.rpartition("-")[2], []).append(RunDirectory(path.parent))

        def newest(group: list[RunDirectory]) -> float:
            return max(files.job.stat().st_mtime for files in group)

        return max(groups.values(), key=newest, default=[self])

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoint folders with a manifest, oldest first."""
        return sorted(path.parent for path in self.checkpoints.glob(f"{CHECKPOINTS}/{MANIFEST}"))

    def progress(self) -> int:
        """A number that grows with saved work: the newest checkpoint's update, or a test's logits in bytes."""
        updates = [update_of(folder) for folder in self.complete_checkpoints()]
        return max(updates, default=0) + sum(path.stat().st_size for path in self.path.glob("logits/*.npz"))

    def last_sign(self, started: str) -> str:
        """When the newest attempt last wrote a file; when it started, if it wrote none. In ISO 8601."""
        written = [self.metrics, self.weights, *self.checkpoints.glob("*"), *self.path.glob("logits/*")]
        newest = max((path.stat().st_mtime for path in written if path.exists()), default=0.0)
        return max(datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"), started)

    def gpu_hours(self, attempt: Mapping[str, Any]) -> float:
        """Hours of an attempt of provenance.json times its GPUs; 0 on CPUs."""
        ended = attempt.get("ended") or self.last_sign(attempt["started"])
        span = datetime.fromisoformat(ended) - datetime.fromisoformat(attempt["started"])
        return span.total_seconds() / 3600 * int(attempt["processes"]) if attempt["gpu"] else 0.0

    def read_result(self) -> dict[str, Any] | None:
        """The content of result.json, or None while the stage is not complete.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self.result.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(self.result.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.result} is damaged; delete it and run the stage again") from error
        return content

    def class_names(self) -> list[str] | None:
        """The class names, index = class number; None if the run has no names.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self.classes.exists():
            return None
        try:
            names: list[str] = json.loads(self.classes.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.classes} is damaged; delete it, and class numbers are shown") from error
        return names

    def write_class_names(self, names: list[str]) -> None:
        """Writes classes.json."""
        write_json(self.classes, names)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, which makes the stage complete."""
        write_json(self.result, result)

    def append_fault(self, fault: Mapping[str, Any]) -> None:
        """Appends one line to faults.jsonl; raises OSError if the disk refuses it."""
        append_text(self.faults, json.dumps(fault) + "\n")

    def read_faults(self) -> list[dict[str, Any]]:
        """The faults, oldest first."""
        return read_json_lines(self.faults)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, oldest first."""
        return read_json_lines(self.metrics)


def checkpoint_name(update: int) -> str:
    """The name of an update's checkpoint folder."""
    return f"step-{update:08d}"


def update_of(checkpoint: Path) -> int:
    """The update of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))
