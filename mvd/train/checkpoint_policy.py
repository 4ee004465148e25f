"""When checkpoints are saved, which are kept, and how failed saves are handled."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.ownership import check_owner
from mvd.distributed.process import Process, gather
from mvd.distributed.signals import save_requests, stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.protocol import describe
from mvd.run_directory import CHECKPOINTS, update_of
from mvd.stage import Stage
from mvd.train.checkpoint_reader import load_newest_checkpoint
from mvd.train.checkpoint_writer import CheckpointWrite, SaveError, save_weights, start_checkpoint
from mvd.train.engine import Engine
from mvd.train.manifest import remove_checkpoint
from mvd.train.snapshot import HostBuffers
from mvd.train.stateful import States


class CheckpointPolicy:
    """A run's checkpoints. All processes call its methods together, except for `wanted`, `flags` and `abandon`.

    A checkpoint is written in the background, one at a time, and counts from its `finish` on.
    """

    def __init__(
        self,
        stage: Stage,
        process: Process,
        steps_per_epoch: int,
        made_by: dict[str, Any],
        note_failure: Callable[[int, int], None],
    ) -> None:
        """note_failure: called with the update of a save that failed and the number of failures in a row."""
        self.stage, self.process, self.made_by, self.note_failure = stage, process, made_by, note_failure
        self.files = stage.files
        epochs = stage.execution.keep_every_epochs
        self.kept_every = None if epochs is None else epochs * steps_per_epoch
        self.newest = 0
        self.failures = 0  # in a row
        self.saved_at = time.monotonic()
        self.seconds = 0.0  # see report
        self.requests = 0  # by signal, that were seen
        self.buffers = HostBuffers()
        self.in_progress: CheckpointWrite | None = None

    def load(self, engine: Engine) -> Mapping[str, Any]:
        """Restores the newest good checkpoint; returns the states saved with it, {} if there is none."""
        loaded = load_newest_checkpoint(engine, self.files, self.process, self.made_by)
        self.newest = loaded.update
        return loaded.state

    def report(self) -> dict[str, float]:
        """How long the saves since the last report have held up training."""
        taken, self.seconds = self.seconds, 0.0
        return {"speed/save_seconds": taken}

    def wanted(self) -> bool:
        """Whether this process wants a save now: by a signal, or because checkpoint_minutes are over."""
        minutes = self.stage.execution.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        requests, self.requests = self.requests, save_requests()
        return self.requests > requests or (late and self.process.is_first)

    def flags(self) -> tuple[bool, bool]:
        """Whether this process wants a save now, and whether it has written its part of the one in progress."""
        return self.wanted(), self.in_progress is not None and self.in_progress.is_written

    def due(self, update: int) -> bool:
        """Whether the settings require a save after this update."""
        every = [n for n in (self.stage.execution.checkpoint_every, self.kept_every) if n is not None]
        return any(update % n == 0 for n in every)

    def save(self, engine: Engine, update: int, state: States) -> bool:
        """Finishes the checkpoint in progress, copies the run's state and starts to write the next.

        Returns False if it could not start.

        Raises:
            RunFailed: saves failed faults.save_failures times in a row.
        """
        self.finish()
        self.saved_at = time.monotonic()

        def start() -> None:
            self.in_progress = start_checkpoint(
                engine, self.files, update, self.process, self.made_by, state, self.buffers
            )

        return self._try(update, start)

    def finish(self) -> bool:
        """Waits for the checkpoint in progress, if there is one, and deletes old ones.

        Returns False if writing failed. Raises as `save` does.
        """
        write = self.in_progress
        if write is None:
            return True
        saved = self._try(write.update, write.finish)
        self.in_progress = None
        if not saved:
            return False
        self.failures, self.newest = 0, write.update
        self._prune()
        return True

    def newest_finished(self) -> int:
        """Finishes the checkpoint in progress; returns the update of the newest."""
        self.finish()
        return self.newest

    def abandon(self) -> None:
        """Stops writing the checkpoint in progress; only what is complete counts."""
        if self.in_progress is not None:
            self.in_progress.abandon()

    def retry(self, save: Callable[[], bool], update: int) -> bool:
        """Repeats a save of the last update until the disk accepts it; returns False if a signal asks to stop first."""
        while not save():
            for _ in range(math.ceil(self.stage.execution.faults.save_again_seconds)):
                heartbeat("waiting for disk space", update)
                time.sleep(1)
                if any(gather(stop_requested())):
                    return False
        return True

    def save_weights(self, engine: Engine, path: Path, update: int) -> bool:
        """Writes the final weights to a file; returns and raises as `finish` does."""
        metadata = {"format": "pt", "stage": self.stage.id, "updates": str(update), **describe(self.stage)}
        saved = self._try(update, lambda: save_weights(engine, path, self.process, metadata))
        self.failures = 0 if saved else self.failures
        return saved

    def _try(self, update: int, save: Callable[[], None]) -> bool:
        check_owner(self.files)
        started = time.monotonic()
        try:
            save()
        except SaveError as error:
            self._fail(update, str(error))
            return False
        finally:
            self.seconds += time.monotonic() - started
        return True

    def _fail(self, update: int, reason: str) -> None:
        self.failures += 1
        limit = self.stage.execution.faults.save_failures
        newest = f"the newest good checkpoint is that of update {self.newest}" if self.newest else "there is none yet"
        message = f"{reason}; {newest} (failure {self.failures} of {limit} in a row)"
        if self.process.is_first:
            record_fault(self.stage.files, "save", message, update)
        self.note_failure(update, self.failures)
        if self.failures >= limit:
            raise RunFailed(f"{self.stage.id}: {message}; free some space, then start the stage again to resume")

    def _prune(self) -> None:
        if not self.process.is_first:
            return
        complete = {update_of(path): path for path in self.files.complete_checkpoints()}
        kept = kept_updates(complete, self.stage.execution.keep_checkpoints, self.kept_every)
        for folder in set(self.files.checkpoints.glob(CHECKPOINTS)) - {complete[update] for update in kept}:
            remove_checkpoint(folder)


def kept_updates(updates: Iterable[int], last: int, every: int | None) -> set[int]:
    """The `last` newest updates, and the multiples of `every`."""
    ascending = sorted(updates)
    return {*ascending[-last:], *(update for update in ascending if every and update % every == 0)}
