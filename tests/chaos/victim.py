"""One process of a run that a storm disturbs: the real `python -m mvd.run` with one fault added."""

import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvd import run as run_module
from mvd.data.datasets import SampleKey, TrainDataset
from mvd.data.video.errors import Unreadable
from mvd.distributed.exit_codes import leave
from mvd.train.loop import TrainingRun
from tests.bad_batches import break_batches

NAN_AT = 9  # the update whose loss is not a number for what the second process reads, in every attempt


class Plan(NamedTuple):
    """The faults of an attempt: the one that ends it, where and when, and whether reads fail at first."""

    ending: str = "none"  # or "signal", "save"
    ranks: tuple[int, ...] = ()
    update: int = 0  # before which the signal comes, or from which on a save is the last one
    number: int = 0  # the signal, or at which flush to the disk the save ends
    flaky: int | None = None  # a file whose number has this remainder modulo 5 cannot be read at the first try
    ballast: Path | None = None  # a file that fills the disk from the attempt's second update on


def be(rank: int, port: int, stage: Path, plan: Plan) -> None:
    """Becomes one of the stage's two processes; its output goes to a file beside stage.yaml."""
    os.setpgid(0, 0)
    output = os.open(stage.parent / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    _break_update(rank, stage.parent / "updates", plan)
    if plan.ending == "save" and rank in plan.ranks:
        _break_save(plan)
    if plan.flaky is not None:
        _break_reads(plan.flaky)
    sys.argv = ["mvd.run", str(stage)]
    leave(run_module.main())


def _break_update(rank: int, log: Path, plan: Plan) -> None:
    update_once = TrainingRun._one_update

    def mark(run: TrainingRun) -> str | None:
        return "loss" if run.update + 1 == NAN_AT and rank == 1 else None

    def update_or_signal(run: TrainingRun, *arguments: Any) -> None:
        if plan.ending == "signal" and run.update + 1 == plan.update and rank in plan.ranks:
            os.kill(os.getpid(), plan.number)
        update_once(run, *arguments)
        if plan.ballast and rank == 0 and log.exists() and not plan.ballast.exists():
            _fill(plan.ballast)
        if rank == 0:
            with open(log, "a") as handle:
                handle.write(f"{run.update + 1}\n")

    TrainingRun._one_update = update_or_signal
    break_batches(mark, lambda _, losses: {name: loss * math.nan for name, loss in losses.items()})


def _fill(ballast: Path) -> None:
    with open(ballast, "wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(shutil.disk_usage(ballast.parent).free - 100_000, 1))


def _break_save(plan: Plan) -> None:
    """Ends the process in a flush to the disk, most of which come from the thread that writes a checkpoint."""
    save, flush, flushes = TrainingRun._save, os.fsync, []

    def flush_or_die(descriptor: int) -> None:
        flushes.append(descriptor)
        if len(flushes) == plan.number:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    def save_or_die(run: TrainingRun) -> bool:
        if run.update >= plan.update:
            os.fsync = flush_or_die
        return save(run)

    TrainingRun._save = save_or_die


def _break_reads(rest: int) -> None:
    read, build = TrainDataset.__getitem__, set()

    def read_at_the_second_try(dataset: TrainDataset, key: SampleKey) -> Any:
        sample = dataset.sample

        def fail_once(entry: Any, of: SampleKey) -> Any:
            if key.index % 5 == rest and key not in build:
                build.add(key)
                raise Unreadable(entry.path, "the disk did not answer")
            return sample(entry, of)

        dataset.sample = fail_once
        try:
            return read(dataset, key)
        finally:
            del dataset.sample

    TrainDataset.__getitem__ = read_at_the_second_try
