"""Micro-batches whose losses are bad on whichever process they are computed, as those of bad data are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mvd.train.loop import TrainingRun
from mvd.train.update import ForwardPass

Losses = dict[str, Tensor]


def break_batches(mark: Callable[[TrainingRun], str | None], spoil: Callable[[str, Losses], Losses]) -> None:
    """Changes the training of this process.

    mark: is called when a run gets a micro-batch, and says in a word what is bad about it, or None. spoil: is called
    with that word and the losses, whenever they are computed, and returns the bad ones.
    """
    learn, losses = TrainingRun.learn, ForwardPass.losses

    def learn_marked(run: TrainingRun, raw: dict[str, Any], batch: dict[str, Tensor]) -> None:
        word = mark(run)
        learn(run, raw if word is None else raw | {"bad": word}, batch)

    def losses_of_marked(forward: ForwardPass, raw: dict[str, Any], batch: dict[str, Tensor]) -> Losses:
        named = losses(forward, raw, batch)
        return spoil(raw["bad"], named) if "bad" in raw else named

    TrainingRun.learn, ForwardPass.losses = learn_marked, losses_of_marked
