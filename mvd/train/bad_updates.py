"""Bad updates: non-finite losses or gradients, and loss spikes.

All processes skip a non-finite update: the weights stay as they are, schedule and data continue. After several in a
row the run returns to its last good checkpoint, once, and skips these updates from there; skipped.json lists them.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.process import Process, gather
from mvd.files import write_json
from mvd.stage import Stage

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 100  # number of latest losses, whose median a spike is compared with
SPIKE_MINIMUM = 20  # number of losses from which on spikes are detected
NAMES_SHOWN = 8
UNWRITTEN: dict[str, dict[str, Any]] = {}  # stage id -> its record, which the disk did not take


class NonFiniteLoss(RunFailed):
    """Losses or gradients are non-finite again after the return to the last good checkpoint."""


class RollBack(Exception):
    """The run must start again from its newest checkpoint; raised on every process."""


class BadUpdates:
    """A run's record of bad updates; all processes call its methods together."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        self.path = stage.files.skipped
        record = json.loads(self.path.read_text()) if process.is_first and self.path.exists() else {}
        record = UNWRITTEN.get(stage.id, record)
        self.record: dict[str, Any] = gather(record)[0] or {"skipped": [], "rollbacks": []}
        self.in_a_row: list[int] = []
        self.skipped: list[int] = []  # all updates that were skipped
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "left_out": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.skipped = list(state["left_out"])

    def skips(self, update: int) -> bool:
        """Whether this update is skipped because of an earlier rollback."""
        skipped = update in self.record["skipped"]
        if skipped and update not in self.skipped:  # in a group, a checkpoint may be saved in the middle of it
            self.skipped.append(update)
        return skipped

    def record_bad(self, update: int, what: str, videos: list[str], newest: Callable[[], int]) -> None:
        """Records a skipped update.

        what: "loss" or "gradient". videos: those of this process that may be the cause. newest: waits for the
        checkpoint in progress, if there is one, and returns the update of the newest.

        Raises:
            RollBack: faults.bad_updates in a row.
            NonFiniteLoss: the same again, after a rollback to the same checkpoint.
        """
        culprits = [(rank, names) for rank, names in enumerate(gather(videos)) if names]
        listed = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in culprits)
        message = f"the {what} is not finite at update {update} ({listed}); the update is skipped"
        if self.process.is_first:
            record_fault(self.stage.files, "non-finite", message, update)
        self.in_a_row.append(update)
        self.skipped.append(update)
        if len(self.in_a_row) >= self.stage.execution.faults.bad_updates:
            reason = f"the {what} was not finite at {len(self.in_a_row)} updates in a row"
            self._roll_back(self.in_a_row, reason, newest())

    def is_bad(self, losses: Mapping[str, float]) -> bool:
        """Whether the next losses are not finite, or a spike among the last ones."""
        return not all(map(math.isfinite, losses.values())) or self._is_spike(losses["loss"])

    def _is_spike(self, loss: float) -> bool:
        factor = self.stage.execution.faults.spike_factor
        return factor is not None and loss > factor * self._median()

    def _median(self) -> float:
        return statistics.median(self.losses) if len(self.losses) >= SPIKE_MINIMUM else math.inf

    def record_good(self, update: int, loss: float, newest: Callable[[], int]) -> dict[str, float]:
        """Records the loss of an update; returns {"loss_spike": loss / median} if it is a spike, else {}.

        newest: see `record_bad`.

        Raises:
            RollBack: it is a spike, and faults.spike_rollback is set.
        """
        self.in_a_row = []
        faults = self.stage.execution.faults
        is_spike, median = self._is_spike(loss), self._median()
        self.losses.append(loss)
        if not is_spike:
            return {}
        if self.process.is_first:
            message = f"the loss of update {update}, {loss:.4g}, is {loss / median:.1f} times the median of the last"
            record_fault(self.stage.files, "spike", f"{message} {len(self.losses) - 1}", update)
        if faults.spike_rollback and (checkpoint := newest()) not in self._returned_to():
            self._roll_back([update], "the loss spiked", checkpoint)
        return {"loss_spike": loss / median}

    def _returned_to(self) -> list[int]:
        return [rollback["to"] for rollback in self.record["rollbacks"]]

    def _roll_back(self, updates: list[int], reason: str, checkpoint: int) -> None:
        where = f"checkpoint of update {checkpoint}" if checkpoint else "start"
        if checkpoint in self._returned_to():
            raise NonFiniteLoss(
                f"{self.stage.id}: {reason}, the last of them update {updates[-1]}, again after a return to the "
                f"{where}; check the inputs listed in {self.stage.files.faults}, or lower the learning rate"
            )
        self.record["skipped"] += updates
        self.record["rollbacks"].append({"at": updates[-1], "to": checkpoint, "reason": reason})
        if self.process.is_first:
            self._write()
            skipped = ", ".join(str(update) for update in updates)
            message = f"{reason}; returning to the {where} and skipping update {skipped} from there"
            record_fault(self.stage.files, "rollback", message, updates[-1])
        raise RollBack(reason)

    def _write(self) -> None:
        """Writes skipped.json; a disk that does not take it costs the record of other attempts only."""
        try:
            write_json(self.path, self.record)
            UNWRITTEN.pop(self.stage.id, None)
        except OSError as error:
            logger.error("%s cannot be written: %s", self.path, error)
            UNWRITTEN[self.stage.id] = self.record


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
