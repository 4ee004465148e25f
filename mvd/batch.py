"""Solves micro-batch x accumulation x processes = global batch. Must not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from mvd.config import ConfigError, Finetune, Pretrain, TrainRecipe


@dataclass(frozen=True)
class Batch:
    """How the samples of an update are divided; the product of the three is the global batch."""

    micro_batch: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    def __str__(self) -> str:
        return f"{self.micro_batch} x {self.accumulation} x {self.world_size} = {self.total}"


def working_world_sizes(recipe: TrainRecipe) -> list[int]:
    """The numbers of processes that divide the recipe's global batch, ascending."""
    units = recipe.optimization.global_batch // smallest_micro_batch(recipe)
    return [count for count in range(1, units + 1) if units % count == 0]


def solve_batch(recipe: TrainRecipe, world_size: int, micro_batch: int | None = None) -> Batch:
    """The largest micro-batch, up to the given one or else the official one, that gives the exact global batch.

    A fine-tuning micro-batch consists of whole pairs of videos, since the two of a pair are mixed with each other; any
    even share of the global batch works, whatever the mixing group.

    Raises:
        ConfigError: there is none; the message has the nearest numbers of processes that work.
    """
    total, unit = recipe.optimization.global_batch, smallest_micro_batch(recipe)
    ceiling = micro_batch or recipe.optimization.micro_batch
    working = working_world_sizes(recipe)
    if world_size not in working:
        below = max((n for n in working if n < world_size), default=None)
        above = min((n for n in working if n > world_size), default=None)
        nearest = " or ".join(str(n) for n in (below, above) if n is not None)
        shares = "whole pairs of videos" if unit == 2 else "whole samples"
        raise ConfigError(
            f"a global batch of {total} does not split into {shares} on {world_size} GPUs; use {nearest} GPUs"
        )
    share = total // world_size
    micro = max(m for m in range(unit, share + 1, unit) if share % m == 0 and m <= max(ceiling, unit))
    return Batch(micro, share // micro, world_size)


def solve_shared(recipes: Sequence[Pretrain], world_size: int, micro_batch: int | None = None) -> list[Batch]:
    """The batches of students that share their teachers (mvd.sharing): all have the micro-batch of the smallest one.

    Raises:
        ConfigError: see solve_batch.
    """
    smallest = min(recipes, key=lambda recipe: recipe.optimization.global_batch)
    ceiling = micro_batch or min(recipe.optimization.micro_batch for recipe in recipes)
    unit = solve_batch(smallest, world_size, ceiling)
    parts = [recipe.optimization.global_batch // unit.total for recipe in recipes]
    return [Batch(unit.micro_batch, unit.accumulation * count, world_size) for count in parts]


def smallest_micro_batch(recipe: TrainRecipe) -> int:
    """Number of samples that must be on the same process; a micro-batch is a multiple of it."""
    return 2 if isinstance(recipe, Finetune) else 1
