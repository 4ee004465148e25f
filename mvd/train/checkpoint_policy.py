"""When checkpoints are saved, which are kept, and how failed saves are handled."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.ownership import check_owner
from mvd.distributed.process import Process
from mvd.distributed.signals import take_save_request
from mvd.evaluation.protocol import describe
from mvd.run_directory import CHECKPOINTS, update_of
from mvd.stage import Stage
from mvd.train.checkpoint import SaveError, load_newest_checkpoint, save_checkpoint, save_weights
from mvd.train.engine import Engine
from mvd.train.stateful import States


class CheckpointPolicy:
    """A run's checkpoints. All processes call its methods together, except for `wanted`."""

    def __init__(self, stage: Stage, process: Process, steps_per_epoch: int, made_by: dict[str, Any]) -> None:
        self.stage, self.process, self.made_by = stage, process, made_by
        self.files = stage.files
        epochs = stage.execution.keep_every_epochs
        self.kept_every = None if epochs is None else epochs * steps_per_epoch
        self.newest = 0
        self.failures = 0  # in a row
        self.saved_at = time.monotonic()
        self.seconds = 0.0  # of the saves since the last report

    def load(self, engine: Engine) -> Mapping[str, Any]:
        """Restores the newest good checkpoint; returns the states saved with it, {} if there is none."""
        loaded = load_newest_checkpoint(engine, self.files, self.process, self.made_by)
        self.newest = loaded.update
        return loaded.state

    def take_seconds(self) -> float:
        """How long the saves since the last call have held up training."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def wanted(self) -> bool:
        """Whether this process wants a save now: by a signal, or because checkpoint_minutes are over."""
        minutes = self.stage.execution.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return take_save_request() or (late and self.process.is_first)

    def due(self, update: int) -> bool:
        """Whether the settings require a save after this update."""
        every = [n for n in (self.stage.execution.checkpoint_every, self.kept_every) if n is not None]
        return any(update % n == 0 for n in every)

    def save(self, engine: Engine, update: int, state: States) -> bool:
        """Saves a checkpoint and deletes old ones; returns False if writing failed.

        Raises:
            RunFailed: writing failed faults.save_failures times in a row.
        """
        started = time.monotonic()
        saved = self._try(
            update, lambda: save_checkpoint(engine, self.files, update, self.process, self.made_by, state)
        )
        self.saved_at = time.monotonic()
        self.seconds += self.saved_at - started
        if saved:
            self.newest = update
            self._prune()
        return saved

    def save_weights(self, engine: Engine, path: Path, update: int) -> bool:
        """Writes the final weights to a file; returns and raises as `save` does."""
        metadata = {"format": "pt", "stage": self.stage.id, "updates": str(update), **describe(self.stage)}
        return self._try(update, lambda: save_weights(engine, path, self.process, metadata))

    def _try(self, update: int, save: Callable[[], None]) -> bool:
        check_owner(self.files)
        try:
            save()
        except SaveError as error:
            self._fail(update, str(error))
            return False
        self.failures = 0
        return True

    def _fail(self, update: int, reason: str) -> None:
        self.failures += 1
        limit = self.stage.execution.faults.save_failures
        newest = f"the newest good checkpoint is that of update {self.newest}" if self.newest else "there is none yet"
        message = f"{reason}; {newest} (failure {self.failures} of {limit} in a row)"
        if self.process.is_first:
            record_fault(self.stage.files, "save", message, update)
        if self.failures >= limit:
            raise RunFailed(f"{self.stage.id}: {message}; free some space, then start the stage again to resume")

    def _prune(self) -> None:
        if not self.process.is_first:
            return
        complete = {update_of(path): path for path in self.files.complete_checkpoints()}
        kept = kept_updates(complete, self.stage.execution.keep_checkpoints, self.kept_every)
        for folder in set(self.files.checkpoints.glob(CHECKPOINTS)) - {complete[update] for update in kept}:
            shutil.rmtree(folder, ignore_errors=True)


def kept_updates(updates: Iterable[int], last: int, every: int | None) -> set[int]:
    """The `last` newest updates, and the multiples of `every`."""
    ascending = sorted(updates)
    return {*ascending[-last:], *(update for update in ascending if every and update % every == 0)}
