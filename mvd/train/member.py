"""One of the students that train in one job; mvd.train.group has what they share."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mvd.distributed.process import Process
from mvd.sharing import Alignment
from mvd.stage import Stage
from mvd.train.loop import TrainingRun
from mvd.train.random_state import random_state, restore_random_state
from mvd.train.shared import Shared


class Member:
    """A student of the group.

    run: None before the start, after a rollback, and when the student is through. units: of the update in progress, how
    many it has had. ending: what ended it before its last update.
    """

    def __init__(self, stage: Stage, unit: int) -> None:
        self.stage, self.unit = stage, unit
        self.run: TrainingRun | None = None
        self.units = 0
        self.is_through = False
        self.ending: Exception | None = None
        self._random: dict[str, Any] | None = None
        self._before: tuple[dict[str, Any] | None, Counter[str]] = (None, Counter())

    @property
    def alignment(self) -> Alignment:
        batch = self.stage.recipe.optimization.global_batch
        return Alignment(len(self.training.dataset), self.unit, batch)

    @property
    def training(self) -> TrainingRun:
        """The run of a student that is being trained."""
        if self.run is None:
            raise RuntimeError(f"{self.stage.id} has no run; it has not begun, or has ended")
        return self.run

    @property
    def next_unit(self) -> int:
        """The unit that its update needs next."""
        return self.alignment.first_unit(self.training.update) + self.units

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """In the block, the global random state is that of the student, as if it ran alone."""
        others = random_state()
        if self._random is not None:
            restore_random_state(self._random)
        try:
            yield
        finally:
            self._random = random_state()
            restore_random_state(others)

    def start(self, process: Process, shared: Shared) -> None:
        """Builds the run from the newest checkpoint."""
        self._random, self.units = None, 0
        self.run = TrainingRun(self.stage, process, shared)
        self.run.begin()

    def begin_update(self) -> None:
        """Begins the next update, and notes what it will change."""
        run = self.training
        self._before = self._random, run.skipped_files.found.copy()
        run.begin_update(float(run.learning_rates[run.update]))

    def stop(self) -> None:
        """Saves and raises Interrupted; an update that has had only some of its units will be made again."""
        if self.units:
            random, self.training.skipped_files.found = self._before
            if random is not None:
                restore_random_state(random)
        self.training.stop()

    def close(self) -> None:
        """Ends the run and frees its memory."""
        run, self.run = self.run, None
        if run is not None:
            run.close()
