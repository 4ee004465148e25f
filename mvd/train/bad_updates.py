"""Updates that must not be made: losses and gradients that are not finite, and losses that jump.

Such an update is left out on all processes: the weights stay, schedule and data go on. Where several follow each
other the run returns to its last good checkpoint once and then leaves these batches out; skipped.json remembers them.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.process import Process, gather
from mvd.files import write_json
from mvd.stage import Stage

SPIKE_WINDOW = 100  # latest losses, whose median a spike is measured against
SPIKE_MINIMUM = 20  # losses without which there is no median
NAMES_SHOWN = 8


class NonFiniteLoss(RunFailed):
    """Losses or gradients stay infinite or NaN, from the last good checkpoint on too."""


class RollBack(Exception):
    """The run is to start again from its newest checkpoint; raised on every process."""


class BadUpdates:
    """A run's record of bad updates; all processes call its methods together."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        self.path = stage.files.skipped
        record = json.loads(self.path.read_text()) if process.is_first and self.path.exists() else {}
        self.record: dict[str, Any] = gather(record)[0] or {"skipped": [], "rollbacks": []}
        self.in_a_row: list[int] = []
        self.skipped: list[int] = []  # all updates that were not made
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "left_out": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.skipped = list(state["left_out"])

    def skips(self, update: int) -> bool:
        """Whether an earlier rollback says that this update is not to be made."""
        skipped = update in self.record["skipped"]
        if skipped:
            self.skipped.append(update)
        return skipped

    def record_bad(self, update: int, what: str, videos: list[str], checkpoint: int) -> None:
        """Names an update that was left out; `videos` are those of this process that may be the cause.

        checkpoint: the update of the newest good checkpoint.

        Raises:
            RollBack: too many in a row.
            NonFiniteLoss: the same once more, after that.
        """
        culprits = [(rank, names) for rank, names in enumerate(gather(videos)) if names]
        named = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in culprits)
        message = f"the {what} is not finite at update {update} ({named}); the update is left out"
        if self.process.is_first:
            record_fault(self.stage.files, "non-finite", message, update)
        self.in_a_row.append(update)
        self.skipped.append(update)
        if len(self.in_a_row) >= self.stage.execution.faults.bad_updates:
            reason = f"the {what} was not finite at {len(self.in_a_row)} updates in a row"
            self._roll_back(self.in_a_row, reason, checkpoint)

    def record_good(self, update: int, loss: float, checkpoint: int) -> dict[str, float]:
        """Takes the loss of an update; returns {"loss_spike": times the median} where it jumped.

        Raises:
            RollBack: it jumped, and the profile wants such batches left out.
        """
        self.in_a_row = []
        faults = self.stage.execution.faults
        median = statistics.median(self.losses) if len(self.losses) >= SPIKE_MINIMUM else math.inf
        self.losses.append(loss)
        if faults.spike_factor is None or loss <= faults.spike_factor * median:
            return {}
        if self.process.is_first:
            message = f"the loss of update {update}, {loss:.4g}, is {loss / median:.1f} times the median of the last"
            record_fault(self.stage.files, "spike", f"{message} {len(self.losses) - 1}", update)
        if faults.spike_rollback and checkpoint not in self._returned_to():
            self._roll_back([update], "the loss jumped", checkpoint)
        return {"loss_spike": loss / median}

    def _returned_to(self) -> list[int]:
        return [rollback["to"] for rollback in self.record["rollbacks"]]

    def _roll_back(self, updates: list[int], reason: str, checkpoint: int) -> None:
        where = f"checkpoint of update {checkpoint}" if checkpoint else "start"
        if checkpoint in self._returned_to():
            raise NonFiniteLoss(
                f"{self.stage.id}: {reason}, the last of them update {updates[-1]}, and once before after the same "
                f"{where}; look at the inputs named in {self.stage.files.faults}, or lower the learning rate"
            )
        self.record["skipped"] += updates
        self.record["rollbacks"].append({"at": updates[-1], "to": checkpoint, "reason": reason})
        if self.process.is_first:
            write_json(self.path, self.record)
            skipped = ", ".join(str(update) for update in updates)
            message = f"{reason}; going back to the {where}, and leaving out update {skipped} from there"
            record_fault(self.stage.files, "rollback", message, updates[-1])
        raise RollBack(reason)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
