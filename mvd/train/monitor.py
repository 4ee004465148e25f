"""What a training run says of itself: TensorBoard events, metrics.jsonl and a progress line."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mvd.files import write_text
from mvd.train.engine import Process

SECTIONS = {  # TensorBoard's headings and what is under them; the rest, the losses above all, is under "training"
    "schedule": ("epochs_done", "lr", "weight_decay"),
    "validation": ("val_top1", "val_unreadable"),
    "speed": ("samples_per_second", "data_wait_share", "decode_ms", "loader_queue", "memory_gb"),
    "faults": ("loss_spike", "failed_saves", "unreadable", "replaced"),
}
SECONDS_BETWEEN_LINES = 15  # where the output is a file: one line then, instead of a line that redraws itself


class Progress:
    """One line with stage, epoch, step, losses, samples/s and ETA; redrawn on a terminal, repeated in a log file."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.interactive = sys.stderr.isatty()
        self.shown_at = 0.0
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            dynamic_ncols=True,
            file=sys.stderr if self.interactive else open(os.devnull, "w"),  # noqa: SIM115
            bar_format="{desc} {percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix} [{elapsed}, ETA {remaining}]",
        )

    def show(self, update: int, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(update - self.bar.n)
        last = update == self.bar.total
        if not self.interactive and (last or time.monotonic() - self.shown_at > SECONDS_BETWEEN_LINES):
            self.shown_at = time.monotonic()
            print(self.bar, flush=True)

    def close(self) -> None:
        self.bar.close()


class Monitor:
    """Writes a run's numbers, on the first process only; the x axis of every curve is the update.

    A resumed run drops what was written after its checkpoint, so that curves never show an update twice. A disk that
    is full or read-only is no reason to stop: what could not be written is said, and tried again later.
    """

    def __init__(self, directory: Path, process: Process, resumed_at: int) -> None:
        self.enabled = process.is_first
        if not self.enabled:
            return
        self.directory = directory
        self.metrics = directory / "metrics.jsonl"
        self.unwritten: list[str] = []
        self.complained = False
        self.events: SummaryWriter | None = None
        with self._tolerating():
            self._keep_metrics_until(resumed_at)
            self.events = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, update: int, epoch: int, values: dict[str, float]) -> None:
        """Adds one record; `epoch` counts from 1 and is the one that `update` belongs to."""
        if not self.enabled:
            return
        self.unwritten.append(json.dumps({"update": update, "epoch": epoch, **values}) + "\n")
        with self._tolerating():
            self._append_unwritten()
            if self.events is None:
                self.events = SummaryWriter(str(self.directory / "tensorboard"))
            for name, value in values.items():
                self.events.add_scalar(tag(name), value, update)

    def latest(self) -> dict[str, float]:
        """Each number's last value, earlier attempts' included; empty on the other processes."""
        values: dict[str, float] = {}
        for record in self._records():
            values |= record
        return values

    def newest(self, name: str) -> int:
        """The last update that has this number; 0 where none has, and on the other processes."""
        return max((record["update"] for record in self._records() if name in record), default=0)

    def flush(self) -> None:
        """Has written what still waits for it, which a kill would take along."""
        if self.enabled:
            with self._tolerating():
                self._append_unwritten()
                if self.events is not None:
                    self.events.flush()

    def close(self) -> None:
        self.flush()
        if self.enabled and self.events is not None:
            with self._tolerating():
                self.events.close()

    def _append_unwritten(self) -> None:
        if self.unwritten:
            _append(self.metrics, "".join(self.unwritten))
            self.unwritten.clear()

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """Says once, and for each time that writing fails again after it went well, that it does."""
        try:
            yield
            self.complained = False
        except OSError as error:
            self.events = None  # its thread has ended
            if not self.complained:
                print(f"FAULT (log): {self.directory} cannot be written: {error}", file=sys.stderr, flush=True)
            self.complained = True

    def _records(self) -> list[dict[str, Any]]:
        if not self.enabled or not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines() if line.endswith("}")]

    def _keep_metrics_until(self, update: int) -> None:
        if self.metrics.exists():
            kept = [json.dumps(record) for record in self._records() if record["update"] <= update]
            write_text(self.metrics, "".join(line + "\n" for line in kept))


def tag(name: str) -> str:
    """What TensorBoard calls a number, for instance `speed/memory_gb`."""
    section = next((section for section, names in SECTIONS.items() if name in names), "training")
    return f"{section}/{name}"


def _append(path: Path, text: str) -> None:
    """Appends all of it or, where that fails, nothing."""
    with open(path, "ab") as handle:
        size = handle.tell()
        try:
            handle.write(text.encode())
            handle.flush()
        except OSError:
            os.ftruncate(handle.fileno(), size)
            raise


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or else in RAM, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
