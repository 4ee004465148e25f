"""What a training run evaluates every few epochs: the extension point, and the list of what there is."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from mvd.config import Finetune
from mvd.distributed.process import Process
from mvd.stage import Stage


class Evaluator(Protocol):
    """Measures the network in training, on all processes together, and changes nothing of the training.

    name: for messages. every_epochs: the interval; it also runs after the last update. metric: one of the numbers that
    `run` returns, by which a resumed run sees whether the evaluation is still to be made.
    """

    name: str
    every_epochs: int
    metric: str

    def run(self, network: nn.Module) -> dict[str, float] | None:
        """The numbers for the curves, the same on every process; None if a signal has asked one of them to stop.

        network: DeepSpeed's engine, or any module that is called as the stage's network is. Under ZeRO-3 every process
        must make the same number of forward passes. The caller restores training mode.
        """
        ...


def build_evaluators(stage: Stage, process: Process) -> Sequence[Evaluator]:
    """The evaluators of a training stage; to add one, append it here.

    Raises:
        ConfigError: its data cannot be found; possibly on some processes only.
    """
    from mvd.evaluation.validation import Validation  # imports this module's protocol

    return [Validation(stage, process)] if isinstance(stage.recipe, Finetune) else []
