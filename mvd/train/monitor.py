"""What a training run says of itself: TensorBoard events, metrics.jsonl and a progress line."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mvd.files import write_text
from mvd.train.engine import Process, gather

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

    A resumed run drops what was written after its checkpoint, so that curves never show an update twice.
    """

    def __init__(self, directory: Path, process: Process, resumed_at: int) -> None:
        self.enabled = process.is_first
        if not self.enabled:
            return
        self.metrics = directory / "metrics.jsonl"
        self._keep_metrics_until(resumed_at)
        self.events = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, update: int, epoch: int, values: dict[str, float]) -> None:
        """Adds one record; `epoch` counts from 1 and is the one that `update` belongs to."""
        if not self.enabled:
            return
        with open(self.metrics, "a") as handle:
            handle.write(json.dumps({"update": update, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, update)

    def latest(self) -> dict[str, float]:
        """Each number's last value, earlier attempts' included; empty on the other processes."""
        values: dict[str, float] = {}
        if self.enabled and self.metrics.exists():
            for line in self.metrics.read_text().splitlines():
                values |= json.loads(line)
        return values

    def flush(self) -> None:
        """Has the events written that are still queued, which a kill would take along."""
        if self.enabled:
            self.events.flush()

    def close(self) -> None:
        if self.enabled:
            self.events.close()

    def _keep_metrics_until(self, update: int) -> None:
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["update"] <= update]
            write_text(self.metrics, "".join(line + "\n" for line in kept))


class UnreadableFiles:
    """Training files that could not be read, of all processes and attempts: one path a line of unreadable.txt."""

    def __init__(self, directory: Path, process: Process) -> None:
        self.path = directory / "unreadable.txt"
        self.process = process
        self.named = set(self.path.read_text().splitlines()) if self.path.exists() else set()
        self.found: set[str] = set()

    def share(self) -> None:
        """Names what any process has found since the last call; all processes call it together."""
        new = sorted(set().union(*gather(self.found)) - self.named)
        self.found.clear()
        self.named.update(new)
        if new and self.process.is_first:
            for path in new:
                print(f"unreadable, the next video takes its place: {path}", flush=True)
            with open(self.path, "a") as handle:
                handle.writelines(f"{path}\n" for path in new)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, or else in RAM, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
