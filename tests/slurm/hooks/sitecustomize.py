"""Faults that a test asks for. Python imports this module at its start in jobs that have this folder in PYTHONPATH.

MVD_TEST_BRAKE=FILE: while the file exists, an attempt pauses after two updates (of all its students together) until it
is told to stop, so that a test can rely on the stage being unfinished. The file may hold {"updates": 5} to pause after
that many, and {"flush": 3, "rank": 1} to pause in the save that follows, when that rank flushes its third file to disk,
as a rule in the thread that writes checkpoints; the training of that rank then pauses too. FILE.reached then holds the
update of the run at which it pauses. While there is a FILE.error, that rank raises a RuntimeError with its text. While
there is a FILE.silent, nothing pauses, and that rank computes wrongly or slowly, as the file says (a key of
SILENT_FAULTS).
MVD_TEST_FAULT=FILE: while the file exists, no stage starts: each fails, or waits if the file says "wait".
MVD_TEST_BAD=FILE: the node whose name is in the file cannot write to run directories; if the file is empty, the second
rank's node. MVD_TEST_WRONG=FILE: linear layers give wrong numbers where and when FILE, which may come and go, says so
(wrong_matmul.py).
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

WRONG = Path(os.environ.get("MVD_TEST_WRONG", "/nowhere/wrong"))
BRAKE, FAULT, BAD = (Path(os.environ.get(f"MVD_TEST_{name}", "/nowhere")) for name in ("BRAKE", "FAULT", "BAD"))

SILENT = BRAKE.with_suffix(".silent")


def brake(loop: ModuleType) -> None:
    plan = {"updates": 2, "flush": 0, "rank": 0} | json.loads(BRAKE.read_text() or "{}")
    is_the_one = int(os.environ["RANK"]) == plan["rank"]
    begin_update, save, flush = loop.TrainingRun.begin_update, loop.TrainingRun._save, os.fsync
    error = BRAKE.with_suffix(".error")
    updates = flushes = 0

    def wait(run):
        if is_the_one:
            BRAKE.with_suffix(".reached").write_text(str(run.update))
        while is_held(loop.stop_requested):
            fail()
            time.sleep(0.1)

    def fail():
        if is_the_one and error.exists():
            raise RuntimeError(error.read_text())

    def braked_update(run, *arguments):
        nonlocal updates
        fail()  # a save may have survived it, but a CUDA error comes back
        reached = is_the_one and flushes >= plan["flush"]
        if updates >= plan["updates"] and (reached or not plan["flush"]):
            wait(run)
        go_wrong(run, is_the_one)
        updates += 1
        begin_update(run, *arguments)

    def braked_save(run):
        def braked_flush(descriptor):
            nonlocal flushes
            flushes += 1
            if flushes == plan["flush"] and is_the_one:
                wait(run)
            flush(descriptor)

        if updates >= plan["updates"]:
            os.fsync = braked_flush
        return save(run)

    loop.TrainingRun.begin_update, loop.TrainingRun._save = braked_update, braked_save


def is_held(stop_requested: Callable[[], bool]) -> bool:
    return BRAKE.exists() and not SILENT.exists() and not stop_requested()


def go_wrong(run, is_the_one):
    """Does what FILE.silent asks for, once in this process."""
    if is_the_one and SILENT.exists() and not changed:
        changed.append(SILENT_FAULTS[SILENT.read_text()](run))


def flip_bit(run):
    """Flips a bit of a weight."""
    import torch

    weight = next(weight for weight in run.task.model.parameters() if weight.ndim > 1 and not weight.eq(0).any())
    weight.data.view(torch.int32).flatten()[3] ^= 1 << 20


def slow_down(run):
    """Makes updates longer by twice what the last one took, and by more than another process takes from this one."""
    losses, seconds = run.task.losses, min(max(2 * run.rank_times.started, 0.5), 2.0)

    def slower(*arguments):
        time.sleep(seconds)
        return losses(*arguments)

    run.task.losses = slower


SILENT_FAULTS = {"flipped bit": flip_bit, "slow rank": slow_down, "matmul": lambda _: None}  # that one: WRONG
changed = []


def spoil(preflight: ModuleType) -> None:
    write_test = preflight._write_test

    def refuse_or_write(stage, rank):
        if not BAD.read_text() and rank == 1:
            BAD.write_text(os.environ["SLURMD_NODENAME"])
        if BAD.read_text() == os.environ["SLURMD_NODENAME"]:
            raise OSError(30, "Read-only file system")
        write_test(stage, rank)

    preflight._write_test = refuse_or_write


def multiply_wrongly(update: ModuleType) -> None:
    from wrong_matmul import break_linear  # this folder is in PYTHONPATH

    break_linear(update.Update, WRONG)


class Change(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes a module right after its import, if the file that asks for it, or its folder, exists then."""

    def __init__(self, file: Path, name: str, change: Callable[[ModuleType], None]) -> None:
        self.file, self.name, self.change = file, name, change

    def find_spec(self, name, path, target=None):
        if name != self.name or not self.file.exists():
            return None
        self.spec = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)

    def exec_module(self, module):
        module.__file__ = self.spec.origin
        self.spec.loader.exec_module(module)
        self.change(module)


class Fault(importlib.abc.MetaPathFinder):
    """Fails or delays the import of mvd.run, before anything slow is imported."""

    def find_spec(self, name, path, target=None):
        while name == "mvd.run" and FAULT.exists():
            if FAULT.read_text() != "wait":
                raise RuntimeError("the fault that a test asked for")
            time.sleep(0.1)


sys.meta_path[:0] = [
    Change(BRAKE, "mvd.train.loop", brake),
    Change(BAD, "mvd.distributed.preflight", spoil),
    Change(WRONG.parent, "mvd.train.update", multiply_wrongly),
    Fault(),
]
