"""The Evaluator protocol, and `build_evaluators`, which lists the evaluators of a stage."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from mvd.config import Finetune, Pretrain, VideoTeacher
from mvd.distributed.process import Process
from mvd.evaluation.pictures import Picture
from mvd.stage import Stage


class Evaluator(Protocol):
    """Evaluates the network on all processes together, without changing the training.

    every_epochs: the interval; it also runs after the last update. metric: one of the names that `run` returns, by
    which a resumed run finds out whether the evaluation was completed. TensorBoard shows a name with a slash, such as
    `validation/knn_top1`, in that section.
    """

    every_epochs: int
    metric: str

    def run(self, network: nn.Module) -> Mapping[str, float | Picture] | None:
        """Name -> value for the curves, the same on every process; None if a signal has asked one of them to stop.

        The first process may add pictures (mvd.evaluation.pictures), whose failure must not raise.

        network: DeepSpeed's engine, called like the stage's network. Under ZeRO-3 every process must make the same
        number of forward passes. The caller restores training mode.
        """
        ...


def build_evaluators(stage: Stage, process: Process) -> Sequence[Evaluator]:
    """The evaluators of a training stage; to add one, append it here.

    Raises:
        ConfigError: the data of an evaluator cannot be found; possibly on some processes only.
    """
    from mvd.evaluation.probe import Probe
    from mvd.evaluation.validation import Validation

    if isinstance(stage.recipe, Finetune):
        return [Validation(stage, process)]
    probed = isinstance(stage.recipe, Pretrain | VideoTeacher) and stage.execution.probe_every > 0
    return [Probe(stage, process)] if probed else []
