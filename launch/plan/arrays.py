"""Groups stages into SLURM arrays and derives the dependency of each array.

A job id is SLURM's, `24` or `24_3`; an array that is not submitted yet is called `#1`, `#2`, and so on.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.cluster import Cluster, Layout
from launch.plan.graph import Node
from mvd.config import KINDS, ConfigError
from mvd.stage import Stage


@dataclass(frozen=True)
class Array:
    """One call of sbatch: stages of one kind and layout, or the shards of one test.

    dependency: a value of sbatch --dependency, such as `aftercorr:#1` or `afterok:#1_3:24`; empty for none.
    """

    name: str
    stages: tuple[Stage, ...]
    layout: Layout
    dependency: str

    @property
    def shards(self) -> int:
        return self.stages[0].execution.shards

    @property
    def size(self) -> int:
        """Number of elements; an array of one is submitted as a plain job."""
        return len(self.stages) * self.shards

    @property
    def job_ids(self) -> list[str]:
        """Per stage, the id for other jobs' dependencies: of its job, or of all its shards together."""
        if len(self.stages) == 1:
            return [self.name]
        return [f"{self.name}_{index}" for index in range(len(self.stages))]


def build_arrays(
    nodes: Sequence[Node],
    stages: Sequence[Stage],
    jobs: Mapping[str, str],
    cluster: Cluster,
    largest: int | None = None,
) -> list[Array]:
    """Arrays for the stages that are to be submitted, parents first.

    nodes: the whole plan. jobs: stage id -> job id of the parents that are queued or running already; a parent in
    neither is complete. largest: the most elements that the site lets an array have.

    Raises:
        ConfigError: a test has more shards than an array may have elements.
    """
    if largest is not None and any(stage.execution.shards > largest for stage in stages):
        raise ConfigError(
            f"test_shards is {cluster.test_shards}, but this site's arrays have at most {largest} elements "
            f"(MaxArraySize of `scontrol show config`); set test_shards to {largest} or less"
        )
    jobs = dict(jobs)
    parents = {node.id: node.stage_parents for node in nodes}
    arrays: list[Array] = []
    for kind in KINDS:
        by_layout: dict[Layout, list[Stage]] = defaultdict(list)
        for stage in stages:
            if stage.kind == kind:
                by_layout[cluster.layout(kind, stage.recipe)].append(stage)
        for layout, alike in by_layout.items():
            waits = {stage.id: tuple(jobs[p] for p in parents[stage.id] if p in jobs) for stage in alike}
            for group, dependency in _groups(alike, waits, largest or len(stages)):
                array = Array(f"#{len(arrays) + 1}", tuple(group), layout, dependency)
                arrays.append(array)
                jobs |= zip((stage.id for stage in group), array.job_ids, strict=True)
    return arrays


def _groups(stages: list[Stage], waits: Mapping[str, tuple[str, ...]], largest: int) -> list[tuple[list[Stage], str]]:
    """Splits stages of one shape into arrays: those that follow another array index by index, then the others.

    Elements of an array share one dependency, so the others are put together by what they wait for.
    """
    groups: list[tuple[list[Stage], str]] = []
    remaining = list(stages)
    while len(layer := _aligned(remaining, waits)[:largest]) > 1:
        groups.append((layer, f"aftercorr:{waits[layer[0].id][0].partition('_')[0]}"))
        remaining = [stage for stage in remaining if stage not in layer]
    alike: dict[tuple[str, ...], list[Stage]] = defaultdict(list)
    for stage in remaining:
        key = (*waits[stage.id], stage.id) if stage.execution.shards > 1 else waits[stage.id]
        alike[key].append(stage)
    for group in alike.values():
        dependency = ":".join(("afterok", *waits[group[0].id])) if waits[group[0].id] else ""
        groups += [(group[first : first + largest], dependency) for first in range(0, len(group), largest)]
    return groups


def _aligned(stages: Sequence[Stage], waits: Mapping[str, tuple[str, ...]]) -> list[Stage]:
    """The longest list of stages whose only parents are the elements 0, 1, 2, ... of one array, in that order."""
    by_array: dict[str, dict[int, Stage]] = defaultdict(dict)
    for stage in stages:
        if len(waits[stage.id]) == 1 and "_" in waits[stage.id][0] and stage.execution.shards == 1:
            array, _, index = waits[stage.id][0].partition("_")
            by_array[array].setdefault(int(index), stage)
    layers = []
    for found in by_array.values():
        length = next(index for index in range(len(found) + 1) if index not in found)
        layers.append([found[index] for index in range(length)])
    return max(layers, key=len, default=[])
