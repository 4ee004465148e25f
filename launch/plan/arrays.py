"""Groups stages into SLURM arrays and derives the dependency of each array.

A job id is SLURM's, `24` or `24_3`; an array that is not submitted yet is called `#1`, `#2`, and so on.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from launch.cluster import Cluster, Layout
from launch.plan.graph import Node
from mvd.config import KINDS, ConfigError
from mvd.stage import Stage

Element = tuple[Stage, ...]  # the stages of one job: one, or several students that share their teachers


@dataclass(frozen=True)
class Array:
    """One call of sbatch: jobs for stages of one kind and layout, or the shards of one test.

    dependency: a value of sbatch --dependency, such as `aftercorr:#1` or `afterok:#1_3:24`; empty for none.
    """

    name: str
    elements: tuple[Element, ...]
    layout: Layout
    dependency: str

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of all elements."""
        return tuple(stage for element in self.elements for stage in element)

    @property
    def shards(self) -> int:
        return self.stages[0].execution.shards

    @property
    def jobs(self) -> list[Element]:
        """What each job runs: a stage, a shard of one, or a group; an array of one is submitted as a plain job."""
        return [job for element in self.elements for job in zip(*(stage.in_shards() for stage in element), strict=True)]

    @property
    def size(self) -> int:
        """Number of jobs."""
        return len(self.elements) * self.shards

    @property
    def job_ids(self) -> list[str]:
        """Per element, the id for other jobs' dependencies: of its job, or of all its shards together."""
        if len(self.elements) == 1:
            return [self.name]
        return [f"{self.name}_{index}" for index in range(len(self.elements))]


def build_arrays(
    nodes: Sequence[Node],
    stages: Sequence[Stage],
    jobs: Mapping[str, str],
    cluster: Cluster,
    groups: Sequence[Sequence[str]] = (),
    largest: int | None = None,
) -> list[Array]:
    """Arrays for the stages that are to be submitted, parents first.

    nodes: the whole plan. jobs: stage id -> job id of the parents that are queued or running already; a parent in
    neither is complete. groups: ids of the stages that run in one job (launch.plan.together). largest: the most
    elements that the site lets an array have.

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
        by_layout: dict[Layout, list[Element]] = defaultdict(list)
        for element in _elements([stage for stage in stages if stage.kind == kind], groups):
            by_layout[_layout(element, cluster)].append(element)
        shared = {job for job, count in Counter(jobs.values()).items() if count > 1}
        for layout, alike in by_layout.items():
            waits = {element[0].id: _waits(element, parents, jobs) for element in alike}
            for chosen, dependency in _arrange(alike, waits, shared, largest or len(stages)):
                array = Array(f"#{len(arrays) + 1}", tuple(chosen), layout, dependency)
                arrays.append(array)
                for element, job in zip(array.elements, array.job_ids, strict=True):
                    jobs |= dict.fromkeys((stage.id for stage in element), job)
    return arrays


def _elements(stages: Sequence[Stage], groups: Sequence[Sequence[str]]) -> list[Element]:
    """The stages job by job; groups come last, so that other arrays can follow the single stages index by index."""
    place = {name: number for number, group in enumerate(groups) for name in group}
    together: dict[int | str, list[Stage]] = defaultdict(list)
    for stage in stages:
        together[place.get(stage.id, stage.id)].append(stage)
    return sorted(map(tuple, together.values()), key=lambda element: len(element) > 1)


def _layout(element: Element, cluster: Cluster) -> Layout:
    """Nodes and GPUs of a job; those of several students are those of their smallest global batch."""
    recipes = [stage.recipe for stage in element]
    if len(element) > 1:
        recipes.sort(key=lambda recipe: recipe.optimization.global_batch)
    return cluster.layout(element[0].kind, recipes[0])


def _waits(element: Element, parents: Mapping[str, list[str]], jobs: Mapping[str, str]) -> tuple[str, ...]:
    """The jobs that the stages of an element wait for."""
    return tuple(dict.fromkeys(jobs[parent] for stage in element for parent in parents[stage.id] if parent in jobs))


def _arrange(
    elements: list[Element], waits: Mapping[str, tuple[str, ...]], shared: Collection[str], largest: int
) -> list[tuple[list[Element], str]]:
    """Splits elements of one shape into arrays: those that follow another array index by index, then the others.

    Elements of an array share one dependency, so the others are put together by what they wait for. So are those that
    wait for students of one job: as soon as their own is complete, that job lets them go (launch.job.students).

    shared: the jobs of several stages.
    """
    found: list[tuple[list[Element], str]] = []
    remaining = list(elements)
    while len(layer := _aligned(remaining, waits, shared)[:largest]) > 1:
        found.append((layer, f"aftercorr:{waits[layer[0][0].id][0].partition('_')[0]}"))
        remaining = [element for element in remaining if element[0].id not in {first.id for first, *_ in layer}]
    alike: dict[tuple[str, ...], list[Element]] = defaultdict(list)
    for element in remaining:
        first = element[0]
        key = (*waits[first.id], first.id) if first.execution.shards > 1 else waits[first.id]
        alike[key].append(element)
    for chosen in alike.values():
        jobs = waits[chosen[0][0].id]
        dependency = ":".join(("afterok", *jobs)) if jobs else ""
        found += [(chosen[start : start + largest], dependency) for start in range(0, len(chosen), largest)]
    return found


def _aligned(
    elements: Sequence[Element], waits: Mapping[str, tuple[str, ...]], shared: Collection[str]
) -> list[Element]:
    """The longest list of elements whose only parents are the elements 0, 1, 2, ... of one array, in that order."""
    by_array: dict[str, dict[int, Element]] = defaultdict(dict)
    for element in elements:
        jobs, splits = waits[element[0].id], element[0].execution.shards > 1
        if len(jobs) == 1 and jobs[0] not in shared and "_" in jobs[0] and not splits:
            array, _, index = jobs[0].partition("_")
            by_array[array].setdefault(int(index), element)
    layers = []
    for found in by_array.values():
        length = next(index for index in range(len(found) + 1) if index not in found)
        layers.append([found[index] for index in range(length)])
    return max(layers, key=len, default=[])
