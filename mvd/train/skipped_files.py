"""Training files that could not be read, and the limit on their number."""

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
    """The unreadable files of all processes and attempts; unreadable.txt lists their paths, one per line.

    All processes create it together. found: how often this process has found each since the last call of `share`.
    """

    def __init__(self, stage: Stage, process: Process, samples: int) -> None:
        self.stage, self.process, self.samples = stage, process, samples
        self.path = stage.files.unreadable
        known = self.path.read_text(encoding="utf-8").splitlines() if process.is_first and self.path.exists() else []
        self.named = set(gather(known)[0])  # on a network disk other ranks may see an older list
        self.found: Counter[str] = Counter()
        self.epoch = self.replaced = 0

    def state_dict(self) -> dict[str, Any]:
        return {"replaced": (self.epoch, self.replaced)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.replaced = state["replaced"]

    def share(self, epoch: int) -> dict[str, float]:
        """Gathers newly found unreadable files from all ranks; all processes call it together.

        Returns {"unreadable": files, "replaced": samples of the epoch that could not be read}.

        Raises:
            RunFailed: there are too many (mvd.config.Faults.too_many_unreadable).
        """
        everywhere: Counter[str] = sum(gather(self.found), Counter())
        self.found.clear()
        self.replaced = everywhere.total() + (self.replaced if epoch == self.epoch else 0)
        self.epoch = epoch
        new = sorted(everywhere.keys() - self.named)
        self.named.update(new)
        if new and self.process.is_first:
            for path in new:
                logger.warning("unreadable, replaced by the next file: %s", path)
            try:
                append_text(self.path, "".join(f"{path}\n" for path in new))
            except OSError as error:  # result.json will list them
                record_fault(self.stage.files, "log", f"{self.path} cannot be written: {error}")
        self._stop_at_too_many()
        return {"unreadable": len(self.named), "replaced": self.replaced}

    def _stop_at_too_many(self) -> None:
        faults = self.stage.execution.faults
        if faults.too_many_unreadable(len(self.named), self.samples):
            message = (
                f"{self.stage.id}: {len(self.named)} of {self.samples} training files cannot be read, more than "
                f"faults.unreadable_share={faults.unreadable_share:g} allows; they are listed in {self.path}"
            )
            if self.process.is_first:
                record_fault(self.stage.files, "unreadable", message)
            raise RunFailed(message)
