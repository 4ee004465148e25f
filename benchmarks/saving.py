"""How long training waits for a checkpoint, and how much memory loading one by other processes takes.

    make bench-saving

The engine of a student under ZeRO-1, after one update, is saved several times by the processes of this machine, as in
a run: a copy, for which the training waits; files, synced to disk, and their checksums in the background; the manifest,
for which it waits again. The share of run time assumes the profile's default interval. Then another number of processes
loads the checkpoint; their state is weights, master weights and Adam's moments.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from launch.cluster import ROOT, Cluster
from launch.local.processes import run_processes
from mvd.batch import Batch
from mvd.config import Optimization
from mvd.distributed.process import Process, gather, start_processes
from mvd.models import build_student
from mvd.run_directory import RunDirectory
from mvd.train.checkpoint_writer import start_checkpoint
from mvd.train.engine import Engine, build_engine
from mvd.train.manifest import read_manifest, remove_checkpoint
from mvd.train.optimizer import build_optimizer
from mvd.train.reshard import load_resharded
from mvd.train.snapshot import HostBuffers

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


def build(size: str, process: Process) -> Engine:
    model = Sum(build_student(size, teacher=size)).to(process.device)
    batch = Batch(1, 1, process.world_size)
    return build_engine(model, build_optimizer(model, OPTIMIZATION), "zero1", batch, "fp32")


def measure_saves(size: str, rounds: int, folder: Path) -> None:
    process = start_processes()
    engine = build(size, process)
    engine.backward(engine())
    engine.step()
    files, buffers = RunDirectory(folder), HostBuffers()
    waits, writes, total = [], [], 0
    for update in range(1, rounds + 2):
        started = time.monotonic()
        write = start_checkpoint(engine, files, update, process, {}, {}, buffers)
        copied = time.monotonic()
        while not all(gather(write.is_written)):
            time.sleep(0.1)
        written = time.monotonic()
        write.finish()
        waits.append(copied - started + time.monotonic() - written)
        writes.append(written - copied)
        total = sum(entry["bytes"] for entries in gather(write.entries) for entry in entries.values())
        if process.is_first and update > 1:
            remove_checkpoint(files.checkpoints / f"step-{update - 1:08d}")
    if process.is_first:
        minutes = Cluster().checkpoint_minutes
        shares = [100 * wait / (60 * minutes) for wait in waits[1:]]
        print(
            f"{size}, {process.world_size} processes, {total / 1e9:.2f} GB: training waits {_spread(waits[1:], 2)} s, "
            f"{_spread(shares, 3)} % of the time (one in {minutes:g} min); the first time {waits[0]:.2f} s; "
            f"written in {_spread(writes, 1)} s",
            flush=True,
        )


def measure_reshard(size: str, folder: Path) -> None:
    process = start_processes()
    engine = build(size, process)
    (checkpoint,) = RunDirectory(folder).complete_checkpoints()
    manifest = read_manifest(checkpoint) or {}
    before = peak = _anonymous_bytes()
    loaded = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not loaded.wait(0.005):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    load_resharded(engine, checkpoint, manifest["world_size"], manifest["zero_stage"])
    seconds = time.monotonic() - started
    loaded.set()
    watcher.join()
    weights = sum(weight.nbytes for weight in engine.module.parameters())
    masters = sum(master.nbytes for master in engine.optimizer.single_partition_of_fp32_groups)
    state = weights + 3 * masters
    ratios = gather((weights + masters + peak - before) / state)
    if process.is_first:
        print(
            f"{size}, saved by {manifest['world_size']} processes, loaded by {process.world_size} in {seconds:.1f} s: "
            f"at most {max(ratios):.2f} times a rank's own state of {state / 1e9:.2f} GB in memory",
            flush=True,
        )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _anonymous_bytes() -> int:
    """Memory of this process without the files that are mapped into it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--load-processes", type=int, default=4, help="how many load the checkpoint (4)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        folder = Path(os.environ["FOLDER"])
        if any(folder.glob("checkpoints/*/manifest.json")):
            measure_reshard(arguments.sizes[0], folder)
        else:
            measure_saves(arguments.sizes[0], arguments.rounds, folder)
        return 0
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=ROOT) as name:  # the disk of the project, not one in memory
            command = [sys.executable, "-m", "benchmarks.saving", "--sizes", size, "--rounds", str(arguments.rounds)]
            for count in (arguments.processes, arguments.load_processes):
                if run_processes(command, count, {"FOLDER": name}):
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
