"""Which pre-trainings of a plan run in one job and share one pass of their teachers (mvd.sharing)."""

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from launch.cluster import Cluster
from launch.plan.graph import Node
from launch.plan.resolve import build_stage
from mvd.batch import Batch, solve_shared
from mvd.config import ConfigError, Pretrain
from mvd.flops import gpu_hours, shared_gpu_hours
from mvd.memory import GB, USABLE, Memory, memory_of_group
from mvd.sharing import Student, sharing_groups, smallest_batch, why_not
from mvd.stage import Stage


class SharedPlan(NamedTuple):
    """The stages of a plan, and which run in one job. apart: why some that could share do not, one sentence each."""

    stages: list[Stage]
    groups: list[list[str]]
    apart: list[str]

    def members(self) -> list[list[Stage]]:
        """The stages of each group."""
        return [[stage for stage in self.stages if stage.id in group] for group in self.groups]

    def missing_members(self) -> list[list[Stage]]:
        """The stages of each group that are not complete, if that is more than one."""
        missing = [[stage for stage in members if not stage.files.read_result()] for members in self.members()]
        return [members for members in missing if len(members) > 1]


def plan_together(nodes: Sequence[Node], cluster: Cluster, asked: Sequence[str]) -> SharedPlan:
    """The stages of a plan as the cluster will run them; arguments and errors as those of `form_groups`."""
    stages = [build_stage(node, cluster) for node in nodes]
    groups, apart = form_groups(nodes, cluster, asked), list[str]()
    if not asked:
        groups, apart = fitting_groups(stages, groups, cluster)
    return SharedPlan(with_shared_batches(stages, groups, cluster), groups, apart)


def form_groups(nodes: Sequence[Node], cluster: Cluster, asked: Sequence[str]) -> list[list[str]]:
    """The ids of the stages that run together, group by group.

    asked: values of --together, rows or stages separated by commas; without any, all that can share do, unless
    pretrain.share_teachers is false.

    Raises:
        ConfigError: what was asked for is not in the plan, or cannot share.
    """
    students = [Student(node.id, node.recipe, node.parents) for node in nodes if isinstance(node.recipe, Pretrain)]
    if asked:
        return [_asked_group(text, nodes, students) for text in asked]
    groups = sharing_groups(students) if cluster.pretrain.share_teachers else []
    return [[student.name for student in group] for group in groups]


def fitting_groups(
    stages: Sequence[Stage], groups: Sequence[list[str]], cluster: Cluster
) -> tuple[list[list[str]], list[str]]:
    """The groups that fit the GPUs' memory, and a sentence for each of the others, whose stages run apart."""
    by_id = {stage.id: stage for stage in stages}
    reasons = {tuple(group): _too_large([by_id[name] for name in group], cluster.gpu_memory_gb) for group in groups}
    apart = [
        f"{', '.join(group)} could share their teachers, but run apart: {reason}; --together can ask for fewer of them"
        for group, reason in reasons.items()
        if reason
    ]
    return [group for group in groups if not reasons[tuple(group)]], apart


def with_shared_batches(stages: Sequence[Stage], groups: Sequence[Sequence[str]], cluster: Cluster) -> list[Stage]:
    """The stages, of which those of a group have the same processes and the same micro-batch.

    Both are those of the smallest global batch and of the smallest micro-batch of the group, or less if the GPU's
    memory holds less for the states of all.

    Raises:
        ConfigError: the states of a group do not fit.
    """
    planned = {stage.id: stage for stage in stages}
    for group in groups:
        planned |= {stage.id: stage for stage in _share([planned[name] for name in group], cluster.gpu_memory_gb)}
    return [planned[stage.id] for stage in stages]


def days_until_complete(plan: SharedPlan, sustained_tflops: float) -> dict[str, float]:
    """Days from the start of its job until a stage is complete, at this many TFLOP/s per GPU.

    A student of a group is complete before the others have made more epochs than it has.
    """
    days = {s.id: gpu_hours(s.recipe, sustained_tflops) / gpus_of(s) / 24 for s in plan.stages}
    for members in plan.members():
        for stage in members:
            recipes = [_cut(other.recipe, stage.recipe.optimization.epochs) for other in members]
            days[stage.id] = shared_gpu_hours(recipes, sustained_tflops) / gpus_of(stage) / 24
    return days


def gpus_of(stage: Stage) -> int:
    """GPUs that a stage occupies at the same time, with all shards of a test."""
    return stage.execution.world_size * stage.execution.shards


def _cut(recipe: Pretrain, epochs: int) -> Pretrain:
    settings = recipe.optimization
    shorter = min(epochs, settings.epochs)
    cut = dataclasses.replace(settings, epochs=shorter, schedule_epochs=settings.laid_out_epochs)
    return dataclasses.replace(recipe, optimization=cut)


def _share(members: Sequence[Stage], gpu_memory_gb: float | None) -> list[Stage]:
    recipes = [stage.recipe for stage in members]
    unit = smallest_batch(recipes)
    world_size = next(s.execution.world_size for s in members if s.recipe.optimization.global_batch == unit)
    most = min(stage.execution.micro_batch for stage in members)
    if reason := _too_large(members, gpu_memory_gb):
        raise ConfigError(
            f"{', '.join(stage.id for stage in members)} cannot share their teachers: {reason}; run fewer of them "
            "--together, or set pretrain.deepspeed=zero3"
        )
    if gpu_memory_gb is not None:
        most = min(most, memory_of_stages(members).most_samples(gpu_memory_gb))
    return [
        _with_batch(stage, batch, batch.total // unit)
        for stage, batch in zip(members, solve_shared(recipes, world_size, most), strict=True)
    ]


def _too_large(members: Sequence[Stage], gpu_memory_gb: float | None) -> str:
    """Why the states of all members do not fit a GPU with one sample, as a clause; empty if they do."""
    memory = memory_of_stages(members)
    if gpu_memory_gb is None or memory.most_samples(gpu_memory_gb) >= 1:
        return ""
    return f"one job needs GPUs of at least {memory.total(1) / USABLE / GB:.1f} GB, got gpu_memory_gb={gpu_memory_gb:g}"


def _with_batch(stage: Stage, batch: Batch, parts: int) -> Stage:
    execution = dataclasses.replace(
        stage.execution,
        world_size=batch.world_size,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        batch_parts=parts,
    )
    return dataclasses.replace(stage, execution=execution)


def memory_of_stages(members: Sequence[Stage]) -> Memory:
    """The memory of students in one job."""
    how = [stage.execution for stage in members]
    recipes = [stage.recipe for stage in members]
    world_size = min(each.world_size for each in how)
    return memory_of_group(recipes, world_size, [each.deepspeed for each in how], how[0].precision)


def _asked_group(text: str, nodes: Sequence[Node], students: Sequence[Student]) -> list[str]:
    rows = {row: node.id for node in nodes if node.kind == "pretrain" for row in node.rows}
    known = {student.name: student for student in students}
    names = list(dict.fromkeys(rows.get(word, word) for word in text.split(",")))
    for name in names:
        if name not in known:
            choices = ", ".join([*rows, *known]) or "none"
            raise ConfigError(f"--together {text}: the plan has no pre-training of {name!r}; use some of {choices}")
    if len(names) < 2:
        raise ConfigError(f"--together {text}: needs two pre-trainings or more, got only {names[0]}; add another row")
    members = [known[name] for name in names]
    for first, second in combinations(members, 2):
        if reason := why_not(first, second):
            raise ConfigError(
                f"--together {text}: {first.name} and {second.name} cannot share their teachers: {reason}; "
                "run them apart"
            )
    return names
