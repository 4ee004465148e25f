"""One process of a run that a storm disturbs: the real `python -m mvd.run` with one fault added."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvd import run as run_module
from mvd.data.datasets import SampleKey, TrainDataset
from mvd.data.video.errors import Unreadable
from mvd.distributed.exit_codes import leave
from mvd.train.loop import TrainingRun
from tests.chaos.subjects import NAN


class Plan(NamedTuple):
    """The faults of an attempt: the one that ends it, where and when, and those that do not.

    notes: a folder with a file for each stage, which lists the updates that the attempt has made of it, one a line.
    """

    notes: Path
    ending: str = "none"  # or "signal", "loader", "save"
    ranks: tuple[int, ...] = ()
    stage: str = ""  # of those that run together, the one whose update or save it is
    update: int = 0  # before which the signal comes, or from which on a save is the last one
    number: int = 0  # the signal, or at which flush to the disk the save ends
    asked: int = 0  # the update of that stage before which a signal asks for a checkpoint; 0: none does
    flaky: int | None = None  # a file whose number has this remainder modulo 5 cannot be read at the first try
    ballast: Path | None = None  # a file that fills the disk from the attempt's second update on


def be(rank: int, port: int, stages: Sequence[Path], plan: Plan) -> None:
    """Becomes one of the two processes of stages that run together; its output goes to a file beside the first."""
    os.setpgid(0, 0)
    output = os.open(stages[0].parent / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    _break_losses(rank)
    _break_update(rank, plan)
    if plan.ending == "save" and rank in plan.ranks:
        _break_save(plan)
    if plan.flaky is not None:
        _break_reads(plan.flaky)
    sys.argv = ["mvd.run", *map(str, stages)]
    leave(run_module.main())


def _break_losses(rank: int) -> None:
    build = TrainingRun.__init__

    def build_with_nan(run: TrainingRun, *arguments: Any) -> None:
        build(run, *arguments)
        losses = run.task.losses

        def losses_or_nan(engine: Any, batch: Any) -> Any:
            bad = math.nan if run.update + 1 in NAN.get(run.stage.id, ()) and rank == 1 else 1.0
            return {name: loss * bad for name, loss in losses(engine, batch).items()}

        run.task.losses = losses_or_nan

    TrainingRun.__init__ = build_with_nan


def _break_update(rank: int, plan: Plan) -> None:
    begin, complete, made = TrainingRun.begin_update, TrainingRun.complete_update, []

    def begin_or_end(run: TrainingRun, learning_rate: float) -> None:
        number = run.update + 1
        if rank in plan.ranks and run.stage.id == plan.stage and number not in made:  # once, after a rollback too
            made.append(number)
            if number == plan.asked:
                os.kill(os.getpid(), signal.SIGUSR1)
            if number == plan.update:
                _end(plan)
        begin(run, learning_rate)

    def note_and_complete(run: TrainingRun, learning_rate: float) -> None:
        log = plan.notes / run.stage.id
        if rank == 0:
            if plan.ballast and log.exists() and not plan.ballast.exists():
                _fill(plan.ballast)
            with open(log, "a") as handle:
                handle.write(f"{run.update + 1}\n")
        complete(run, learning_rate)

    TrainingRun.begin_update, TrainingRun.complete_update = begin_or_end, note_and_complete


def _end(plan: Plan) -> None:
    if plan.ending == "signal":
        os.kill(os.getpid(), plan.number)
    if plan.ending == "loader":
        for loader in multiprocessing.active_children():
            os.kill(loader.pid, signal.SIGKILL)


def _fill(ballast: Path) -> None:
    with open(ballast, "wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(shutil.disk_usage(ballast.parent).free - 100_000, 1))


def _break_save(plan: Plan) -> None:
    """Ends the process in a flush of a file of the stage, most of which come from a thread that writes."""
    save, flush, flushes = TrainingRun._save, os.fsync, []

    def flush_or_die(descriptor: int) -> None:
        if plan.stage in Path(f"/proc/self/fd/{descriptor}").readlink().parts:
            flushes.append(descriptor)
            if len(flushes) == plan.number:
                os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    def save_or_die(run: TrainingRun) -> bool:
        if run.stage.id == plan.stage and run.update >= plan.update:
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
