"""Training files that could not be read: who they are, and how many of them are too many."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.process import Process, gather
from mvd.files import append_text
from mvd.stage import Stage

logger = logging.getLogger(__name__)


class SkippedFiles:
    """The unreadable files of all processes and attempts, one path a line of unreadable.txt; all make it together.

    found: how often this process has met each since the last call of `share`.
    """

    def __init__(self, stage: Stage, process: Process, samples: int) -> None:
        self.stage, self.process, self.samples = stage, process, samples
        self.path = stage.files.unreadable
        known = self.path.read_text().splitlines() if process.is_first and self.path.exists() else []
        self.named = set(gather(known)[0])  # a network disk may show the others an older list
        self.found: Counter[str] = Counter()
        self.epoch = self.replaced = 0

    def state_dict(self) -> dict[str, Any]:
        return {"replaced": (self.epoch, self.replaced)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.replaced = state["replaced"]

    def share(self, epoch: int) -> dict[str, float]:
        """Gather newly found unreadable files from all ranks; all processes call it together.

        Returns {"unreadable": files, "replaced": samples of the epoch that could not be read}.

        Raises:
            RunFailed: there are more than the profile puts up with.
        """
        everywhere = sum(gather(self.found), Counter())
        self.found.clear()
        self.replaced = everywhere.total() + (self.replaced if epoch == self.epoch else 0)
        self.epoch = epoch
        new = sorted(everywhere.keys() - self.named)
        self.named.update(new)
        if new and self.process.is_first:
            for path in new:
                logger.warning("unreadable, the next video takes its place: %s", path)
            try:
                append_text(self.path, "".join(f"{path}\n" for path in new))
            except OSError as error:  # result.json and the next attempt name them
                record_fault(self.stage.files, "log", f"{self.path} cannot be written: {error}")
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
                record_fault(self.stage.files, "unreadable", message)
            raise RunFailed(message)
