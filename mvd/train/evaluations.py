"""When the evaluators of a training run are due."""

import time
from collections.abc import Sequence

from torch import nn

from mvd.distributed.process import gather
from mvd.evaluation.evaluator import Evaluator
from mvd.monitoring.metrics import Metrics


class Evaluations:
    """Runs each evaluator after every `every_epochs` epochs and after the last update; all processes call it together.

    metrics: receives the results, and says which evaluations earlier attempts have completed.
    """

    def __init__(
        self, evaluators: Sequence[Evaluator], metrics: Metrics, steps_per_epoch: int, total_updates: int
    ) -> None:
        self.evaluators, self.metrics = evaluators, metrics
        self.steps_per_epoch, self.total_updates = steps_per_epoch, total_updates
        self.completed = [gather(metrics.newest(evaluator.metric))[0] for evaluator in evaluators]

    def due(self, update: int) -> list[int]:
        """The places of the evaluators that are due after this update."""
        epoch, rest = divmod(update, self.steps_per_epoch)
        return [
            place
            for place, evaluator in enumerate(self.evaluators)
            if not rest
            and (epoch % evaluator.every_epochs == 0 or update == self.total_updates)
            and update > self.completed[place]
        ]

    def run_due(self, network: nn.Module, update: int) -> bool:
        """Runs the evaluators that are due after this update and leaves the network in training mode.

        Returns False if a signal has asked the run to stop; the next attempt then runs what is left.
        """
        epoch = update // self.steps_per_epoch
        for place in self.due(update):
            started = time.monotonic()
            values = self.evaluators[place].run(network)
            network.train()
            if values is None:
                return False
            for name, value in values.items():
                if not isinstance(value, float | int):
                    self.metrics.image(update, name, value)
            numbers = {name: value for name, value in values.items() if isinstance(value, float | int)}
            numbers["speed/evaluation_seconds"] = time.monotonic() - started
            self.metrics.write(update, epoch, numbers)
            self.metrics.flush()
            self.completed[place] = update
        return True
