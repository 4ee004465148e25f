"""Solves micro-batch x accumulation x processes = global batch. Free of torch."""

from dataclasses import dataclass

from mvd.config import ConfigError, Finetune, Recipe, Test


@dataclass(frozen=True)
class Batch:
    """How an update's samples are shared out; the product of the three is the global batch."""

    micro_batch: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    def __str__(self) -> str:
        return f"{self.micro_batch} x {self.accumulation} x {self.world_size} = {self.total}"


def solve_batch(recipe: Recipe, world_size: int, micro_batch: int | None = None) -> Batch:
    """The largest micro-batch, up to the given or else the official one, that makes the global batch exactly.

    A fine-tuning micro-batch holds whole pairs of videos, since the two members of a pair are mixed with each other;
    so any even share of the global batch works, whatever the mixing group.

    Raises:
        ConfigError: no micro-batch works; names the nearest process counts that do.
    """
    if isinstance(recipe, Test):
        raise ConfigError("a test has no global batch to solve")
    total = recipe.optimization.global_batch
    unit = 2 if isinstance(recipe, Finetune) else 1
    ceiling = micro_batch or recipe.optimization.micro_batch
    if world_size < 1 or total % (world_size * unit):
        working = [n for n in range(1, total // unit + 1) if total % (n * unit) == 0]
        below = max((n for n in working if n < world_size), default=None)
        above = min((n for n in working if n > world_size), default=None)
        nearest = " or ".join(str(n) for n in (below, above) if n is not None)
        shares = "whole pairs of videos" if unit == 2 else "whole samples"
        raise ConfigError(
            f"a global batch of {total} does not split into {shares} on {world_size} GPUs; use {nearest} GPUs"
        )
    share = total // world_size
    candidates = [m for m in range(unit, share + 1, unit) if share % m == 0 and m <= max(ceiling, unit)]
    micro = max(candidates)
    return Batch(micro, share // micro, world_size)
