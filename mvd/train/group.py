"""Several students in one job, which learn from one pass of their teachers.

Each micro-batch is read, and seen by the teachers, once; then each student makes its forward and backward pass and, at
the end of its update, its step. Everything else is the student's own, as if it ran alone: engine, random state,
schedule, checkpoints, metrics, faults and result. With the same micro-batch and processes its weights are bit-equal.

Time runs in units of the smallest global batch of the planned group (mvd.sharing). A student that is ahead, since its
checkpoint is newer or another one went back to its own, waits until the loader comes to its next unit.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from mvd.config import ConfigError
from mvd.data.datasets import build_dataset
from mvd.data.device_batches import DeviceBatches
from mvd.data.on_device import prepare
from mvd.data.workers import kill_workers
from mvd.distributed.faults import RunFailed
from mvd.distributed.ownership import check_owner
from mvd.distributed.process import Process, exit_together, gather
from mvd.distributed.signals import Interrupted
from mvd.distributed.watchdog import heartbeat, next_turn
from mvd.stage import Stage
from mvd.train.bad_updates import RollBack
from mvd.train.member import Member
from mvd.train.shared import (
    Shared,
    check_planned_together,
    check_start,
    free_memory,
    loaded_stage,
    start_batches,
)
from mvd.train.tasks import Teachers

logger = logging.getLogger(__name__)

Complete = Callable[[Stage, dict[str, Any]], object]
Failed = Callable[[Stage, str], object]


def train_together(stages: Sequence[Stage], process: Process, complete: Complete, failed: Failed) -> None:
    """Trains several students, each from its newest checkpoint to its end.

    complete: is called with each stage and the content of its result.json, as soon as its weights are written. failed:
    with a stage that cannot continue, and why, while the others go on.

    Raises:
        ConfigError: the students cannot share their teachers as they are planned, or a setting or input is invalid.
        RunFailed: some students cannot continue; the others are complete. Raised on every process.
        HostFault: a machine failed the checks before the start; raised on every process.
        Interrupted: stopped by a signal; every student is saved. Raised on every process.
    """
    group = Group(stages, process, complete, failed)
    try:
        group.to_the_end()
    finally:
        group.close()
    stops = [member.ending for member in group.members if isinstance(member.ending, Interrupted)]
    if stops:
        raise Interrupted("\n".join(map(str, stops)), max(stop.update for stop in stops))
    failures = [str(member.ending) for member in group.members if member.ending is not None]
    if failures:
        raise RunFailed("; ".join(failures))


class Group:
    """Students in training, and what they share."""

    def __init__(self, stages: Sequence[Stage], process: Process, complete: Complete, failed: Failed) -> None:
        self.process, self.complete, self.failed = process, complete, failed
        self.started = time.monotonic()
        heartbeat("starting", 0)
        with exit_together():
            check_planned_together(stages)
            self.source = loaded_stage(stages)
            dataset = build_dataset(self.source)
        check_start(self.source, process, dataset, [stage for stage in stages if stage.id != self.source.id])
        how = self.source.execution
        with exit_together():
            teachers = Teachers(self.source.recipe, self.source.inputs, how.precision, process.device)
        self.shared = Shared(dataset, DeviceBatches(iter(()), process.device), teachers)
        unit = self.source.recipe.optimization.global_batch
        self.members = [Member(stage, unit) for stage in stages]
        self.is_stopping = False

    @property
    def left(self) -> list[Member]:
        """The students that are not through."""
        return [member for member in self.members if not member.is_through]

    def to_the_end(self) -> None:
        """Trains until every student is complete, has failed or was interrupted."""
        while self.left:
            for member in [member for member in self.left if member.run is None]:
                free_memory()  # of the run before a rollback
                self._turn(member, partial(self.start, member))
            if not self._stop_if_asked():
                self._train()

    def close(self) -> None:
        """Ends all runs and the loader processes."""
        for member in self.members:
            member.close()
        self._end_loader()

    def start_loader(self, first: int) -> None:
        """Reads the micro-batches from a unit on."""
        self._end_loader()
        self.shared.batches.source = start_batches(self.source, self.shared.dataset, self.process, first).source

    def _end_loader(self) -> None:
        self.shared.batches.end()
        kill_workers()

    def start(self, member: Member) -> None:
        """Builds the run of a student, which may lack only its weights or its result.

        Raises:
            RunFailed: it cannot be built, as from a checkpoint of another precision; on every process.
        """
        failure = None
        try:
            member.start(self.process, self.shared)
        except (ConfigError, SystemExit) as error:  # all processes come here: see exit_together
            failure = str(error) if isinstance(error, ConfigError) else ""
        if failure is not None:  # raised outside, so that nothing holds the half-built run
            said: list[str] = gather(failure)
            raise RunFailed(next(filter(None, said), f"{member.stage.id}: see the log"))
        check_owner(member.stage.job_files)  # it may have been cancelled meanwhile
        minutes = member.stage.execution.checkpoint_minutes or 0.0
        place = self.members.index(member) / len(self.members)
        member.training.checkpoints.saved_at -= 60 * minutes * place  # so that not all save after the same update
        self._complete_if_finished(member)

    def _train(self) -> None:
        """Trains from the first unit that a student needs, until one must be started again or all are through."""
        first = min((member.next_unit for member in self.left if member.run is not None), default=None)
        if first is None:
            return
        self.start_loader(first)
        unit = first
        while self.left and all(member.run is not None for member in self.left) and not self._stop_if_asked():
            self.one_unit([member for member in self.left if member.next_unit == unit])
            unit += 1

    def one_unit(self, members: Sequence[Member]) -> None:
        """Passes the micro-batches of a unit on to the students whose updates need it; nobody may."""
        for member in members:
            if member.units == 0:
                member.begin_update()
        for _ in range(self.source.execution.accumulation):
            if not members:
                heartbeat("reading videos")
                next(self.shared.batches)  # left over at the end of an epoch
                continue
            self._one_micro_batch(members, members[0].training.next_batch())
        for member in members:
            if member.run is None:
                continue  # it goes back, since the teachers had changed
            member.units += 1
            if member.units == member.alignment.units:
                member.units = 0
                self._turn(member, partial(self._finish_update, member))

    def _one_micro_batch(self, members: Sequence[Member], raw: dict[str, Any]) -> None:
        batch: dict[str, Any] = {}
        with ExitStack() as pictures:
            learning = [member.training for member in members if member.training.running is not None]
            if learning:
                batch = prepare(raw, self.source.recipe, self.process.device)
                for run in learning:
                    pictures.enter_context(run.pictures.watching(run.update + 1, batch))
                heartbeat("in forward and backward", learning[0].update + 1)
                batch |= learning[0].compilation.run(partial(self.shared.teachers.targets, batch))
            for member in members:
                next_turn()
                with member.own_random_state():
                    member.training.learn(raw, batch)

    def _finish_update(self, member: Member) -> None:
        run = member.training
        learning_rate = float(run.learning_rates[run.update])
        run.finish_update()
        run.complete_update(learning_rate)
        self._complete_if_finished(member)

    def _complete_if_finished(self, member: Member) -> None:
        run = member.training
        if run.is_finished:
            run.write_weights()
            result = {**run.result(), "wall_seconds": time.monotonic() - self.started}
            member.is_through = True
            member.close()
            self.complete(member.stage, result)

    def _turn(self, member: Member, action: Callable[[], None]) -> None:
        """Lets one student act with its own random state; what ends it, or sends it back, does not end the others."""
        next_turn()
        try:
            with member.own_random_state():
                action()
        except RollBack:
            member.close()
            self._restore_teachers()
        except (RunFailed, Interrupted) as ending:
            member.ending, member.is_through = ending.with_traceback(None), True
            member.close()
            self.is_stopping |= isinstance(ending, Interrupted)
            if not isinstance(ending, Interrupted):
                if self.process.is_first:
                    logger.error("%s ends, the others go on: %s", member.stage.id, ending)
                self.failed(member.stage, str(ending))

    def _restore_teachers(self) -> None:
        """Loads the teachers again; if they had changed on a process, all students go back, having learnt from them."""
        heartbeat("starting")
        with exit_together():
            had_changed = self.shared.teachers.reload()
        if any(gather(had_changed)):
            for member in self.left:
                member.close()

    def _stop_if_asked(self) -> bool:
        """Once a signal has stopped one student, stops the others too; returns whether it did."""
        if self.is_stopping:
            for member in self.left:
                if member.run is None:
                    member.is_through = True  # it was to start again from a checkpoint, and will
                else:
                    self._turn(member, member.stop)
        return self.is_stopping
