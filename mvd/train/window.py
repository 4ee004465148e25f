"""Running sums since the last report."""

from collections.abc import Mapping
from typing import Any


class Window:
    """Means and speed of the updates since the last report; checkpoints and validations do not count. A Stateful."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts anew, after a report."""
        self.seconds = self.waited = 0.0
        self.updates = 0
        self.sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float], seconds: float, waited: float) -> None:
        """One update: its values, how long it took, and how much of that was waiting for data, both in seconds."""
        self.updates += 1
        self.seconds += seconds
        self.waited += waited
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}

    def means(self, global_batch: int) -> dict[str, float]:
        """The mean of each value over the updates, and how fast they were."""
        return {name: total / self.updates for name, total in self.sums.items()} | {
            "samples_per_second": self.updates * global_batch / self.seconds,
            "data_wait_share": self.waited / self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds, self.waited = state["seconds"], state["waited"]
        self.updates, self.sums = state["updates"], dict(state["sums"])
