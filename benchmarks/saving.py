"""Time that training is blocked while a checkpoint is saved: `make bench-saving`.

The engine of a student under ZeRO-1, after one update, is saved several times by the processes of this machine, as in
a run: files, sync to disk, checksums, manifest. The share of run time assumes the profile's default interval.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from mvd.train.checkpoint import save_checkpoint
from torch import nn

from launch.cluster import ROOT, Cluster
from launch.local.processes import run_processes
from mvd.batch import Batch
from mvd.config import Optimization
from mvd.distributed.process import start_processes
from mvd.models import build_student
from mvd.run_directory import RunDirectory
from mvd.train.engine import build_engine
from mvd.train.optimizer import build_optimizer

OPTIMIZATION = Optimization(
    global_batch=2, epochs=1, warmup_epochs=0, base_lr=1e-4, min_lr=0.0, betas=(0.9, 0.95), micro_batch=1
)


class Sum(nn.Module):
    """A network whose loss is the sum of its weights: an update of its optimizer without a forward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.network.parameters() if weight.requires_grad]).sum()


def measure(size: str, rounds: int, folder: Path) -> None:
    process = start_processes()
    model = Sum(build_student(size, teacher=size)).to(process.device)
    batch = Batch(1, 1, process.world_size)
    engine = build_engine(model, build_optimizer(model, OPTIMIZATION), "zero1", batch, "fp32")
    engine.backward(engine())
    engine.step()
    files = RunDirectory(folder)
    seconds = []
    for update in range(1, rounds + 2):
        started = time.monotonic()
        save_checkpoint(engine, files, update, process, {}, {})
        seconds.append(time.monotonic() - started)
    if process.is_first:
        saved = sum(path.stat().st_size for path in files.checkpoints.glob("step-00000001/*")) / 1e9
        median, minutes = statistics.median(seconds[1:]), Cluster().checkpoint_minutes
        share = 100 * median / (60 * minutes)
        print(
            f"{size}: {saved:.2f} GB saved by {process.world_size} processes in {median:.2f} s "
            f"({min(seconds[1:]):.2f} to {max(seconds[1:]):.2f}), {share:.2f} % of the time, one in {minutes:g} min",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.sizes[0], arguments.rounds, Path(os.environ["FOLDER"]))
        return 0
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # the disk of the project, not one in memory
            command = [sys.executable, "-m", "benchmarks.saving", "--sizes", size, "--rounds", str(arguments.rounds)]
            if run_processes(command, arguments.processes, {"FOLDER": folder}):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
