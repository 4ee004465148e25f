"""Running sums since the last report."""

from collections.abc import Mapping
from typing import Any


class Window:
    """Means and speed of the updates since the last report, without checkpoints and evaluations. A Stateful."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Resets all sums, after a report."""
        self.seconds = self.waited = 0.0
        self.updates = 0
        self.sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float], seconds: float, waited: float) -> None:
        """Adds an update: its values, its duration, and the part of it spent waiting for data, both in seconds."""
        self.updates += 1
        self.seconds += seconds
        self.waited += waited
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}

    def means(self, global_batch: int) -> dict[str, float]:
        """The mean of each value over the updates, the samples per second, and the share of time waiting for data."""
        return {name: total / self.updates for name, total in self.sums.items()} | {
            "samples_per_second": self.updates * global_batch / self.seconds,
            "data_wait_share": self.waited / self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds, self.waited = state["seconds"], state["waited"]
        self.updates, self.sums = state["updates"], dict(state["sums"])
