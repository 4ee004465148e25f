"""What a plan costs, and which of its stages share a job."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.plan.graph import Node
from launch.plan.rehearsed import Cost
from launch.plan.together import SharedPlan, days_until_complete, gpus_of, memory_of_stages
from mvd.flops import gpu_hours, saved_gpu_hours
from mvd.memory import GB
from mvd.stage import Stage


def print_totals(nodes: Sequence[Node], plan: SharedPlan, found: Sequence[Cost], rate: float) -> None:
    """Prints GPU-hours and days of a whole plan, and which stages they were measured for.

    found: of each stage alone. rate: sustained_tflops, for what was not measured and for what groups save.
    """
    alone = sum(cost.gpu_hours for cost in found)
    days = _days(plan, found, rate)
    last = {max(group, key=lambda name: days[name]) for group in plan.groups}
    jobs = [node.id for node in nodes if node.id in last or not any(node.id in group for group in plan.groups)]
    gpus = {stage.id: gpus_of(stage) for stage in plan.stages}
    hours = sum(days[name] * gpus[name] * 24 for name in jobs)
    estimated = (
        f"at {rate:g} TFLOP/s sustained per GPU (cluster.sustained_tflops), without decoding, validation and "
        "recomputed activations"
    )
    measured = {str(place): cost.measured for place, cost in enumerate(found, start=1) if cost.measured}
    if measured:
        where = ", ".join(dict.fromkeys(_measured_on(figures) for figures in measured.values()))
        others = f"; the others {estimated}" if len(measured) < len(found) else ", without validation"
        estimated = f"at the rates that rehearsals measured on {where} for # {', '.join(measured)}{others}"
    apart = f" ({_hours(alone)} without shared teachers)" if plan.groups else ""
    print(
        f"about {_hours(hours)} GPU-hours{apart} {estimated};\n"
        f"{sum(days[name] for name in jobs):,.1f} days one job after the other, {_longest_chain(nodes, days):,.1f} if "
        "all that can run at the same time do"
    )


def _hours(value: float) -> str:
    return f"{value:,.{0 if value >= 10 else 2}f}"


def _days(plan: SharedPlan, found: Sequence[Cost], rate: float) -> dict[str, float]:
    """Days from the start of its job until a stage is complete; those of a group as long as its members took alone."""
    days = {stage.id: cost.gpu_hours / gpus_of(stage) / 24 for stage, cost in zip(plan.stages, found, strict=True)}
    estimated = days_until_complete(plan, rate)
    for members in plan.members():
        alone = sum(gpu_hours(stage.recipe, rate) / gpus_of(stage) / 24 for stage in members)
        scale = sum(days[stage.id] for stage in members) / alone
        days |= {stage.id: scale * estimated[stage.id] for stage in members}
    return days


def _measured_on(figures: Mapping[str, Any]) -> str:
    """For instance `NVIDIA H100 80GB HBM3 with generated samples`."""
    return (figures["gpu"] or "CPUs") + (" with generated samples" if figures["generated_data"] else "")


def _longest_chain(nodes: Sequence[Node], days: Mapping[str, float]) -> float:
    """Days of the longest chain of stages that wait for each other."""
    ends: dict[str, float] = {}
    for node in nodes:  # parents first
        ends[node.id] = days[node.id] + max((ends[parent] for parent in node.stage_parents), default=0.0)
    return max(ends.values())


def print_groups(plan: SharedPlan, found: Sequence[Cost], rate: float) -> None:
    """Prints which stages run together, what that saves of the GPU-hours above, and what memory it takes.

    Stages that are complete are left out. found, rate: as for `print_totals`.
    """
    number = {stage.id: place for place, stage in enumerate(plan.stages, start=1)}
    costs = {stage.id: cost.gpu_hours for stage, cost in zip(plan.stages, found, strict=True)}
    for members in plan.missing_members():
        recipes = [stage.recipe for stage in members]
        alone = sum(costs[stage.id] for stage in members)
        saved = saved_gpu_hours(recipes, rate) * alone / sum(gpu_hours(recipe, rate) for recipe in recipes)
        numbers = ", ".join(str(number[stage.id]) for stage in members)
        print(
            f"stages {numbers} run together with one pass of their teachers: {_hours(alone - saved)} instead of "
            f"{_hours(alone)} GPU-hours, {_hours(saved)} saved; {group_memory(members):,.1f} GB per GPU"
        )
    if plan.missing_members():
        print(
            "the next stages of a student start as soon as it is complete; "
            "cluster.pretrain.share_teachers=false runs all of them apart"
        )
    for sentence in plan.apart:
        print(sentence)


def group_memory(members: Sequence[Stage]) -> float:
    """GB of each GPU for students in one job."""
    return memory_of_stages(members).total(members[0].execution.micro_batch) / GB
