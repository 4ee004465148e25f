"""Training files that could not be read: who they are, and how many of them are too many."""

from collections import Counter
from typing import Any

from mvd.stage import Stage
from mvd.train.engine import Process, gather
from mvd.train.faults import GivenUp, record_fault

QUARANTINE = "unreadable.txt"


class UnreadableFiles:
    """The unreadable files of all processes and attempts, one path a line of unreadable.txt; all make it together.

    found: how often this process has met each since the last call of `share`.
    """

    def __init__(self, stage: Stage, process: Process, samples: int, state: dict[str, Any]) -> None:
        self.stage, self.process, self.samples = stage, process, samples
        self.path = stage.directory / QUARANTINE
        known = self.path.read_text().splitlines() if process.is_first and self.path.exists() else []
        self.named = set(gather(known)[0])  # a network disk may show the others an older list
        self.found: Counter[str] = Counter()
        self.epoch, self.replaced = state.get("replaced", (0, 0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint is to hold of it."""
        return {"replaced": (self.epoch, self.replaced)}

    def share(self, epoch: int) -> dict[str, float]:
        """Names what any process has found since the last call; all processes call it together.

        Returns {"unreadable": files, "replaced": samples of the epoch that were not read, or in vain}.

        Raises:
            GivenUp: there are more than the profile puts up with.
        """
        everywhere = sum(gather(self.found), Counter())
        self.found.clear()
        self.replaced = everywhere.total() + (self.replaced if epoch == self.epoch else 0)
        self.epoch = epoch
        new = sorted(everywhere.keys() - self.named)
        self.named.update(new)
        if new and self.process.is_first:
            for path in new:
                print(f"unreadable, the next video takes its place: {path}", flush=True)
            try:
                with open(self.path, "a") as handle:
                    handle.writelines(f"{path}\n" for path in new)
            except OSError as error:  # result.json and the next attempt name them
                record_fault(self.stage.directory, "log", f"{self.path} cannot be written: {error}")
        self._stop_at_too_many()
        return {"unreadable": len(self.named), "replaced": self.replaced}

    def _stop_at_too_many(self) -> None:
        limit = self.stage.execution.faults.unreadable_share
        if len(self.named) > limit * self.samples:
            message = (
                f"{self.stage.id}: {len(self.named)} of {self.samples} training files cannot be read, more than the "
                f"share of faults.unreadable_share={limit:g}; they are listed in {self.path}"
            )
            if self.process.is_first:
                record_fault(self.stage.directory, "unreadable", message)
            raise GivenUp(message)
