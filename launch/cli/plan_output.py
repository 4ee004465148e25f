"""What submit.py prints before anything runs: every setting (--show), or the plan (--dry-run)."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from launch.cli.output import command, counted, print_next, print_table, short
from launch.cli.parser import Request
from launch.cluster import EXAMPLE, ROOT, Cluster
from launch.plan.arrays import build_arrays
from launch.plan.differences import describe, target_text
from launch.plan.graph import Node
from launch.plan.together import SharedPlan, days_until_complete, gpus_of, memory_of_stages
from launch.plan.weights import notes_on_weights
from mvd.config import KINDS, Row, Test
from mvd.flops import gpu_hours, saved_gpu_hours
from mvd.identity import sizes_of
from mvd.memory import GB, memory_of
from mvd.stage import Stage

NOUNS = ("image teacher", "video teacher", "pre-training", "fine-tuning", "test")  # in the order of KINDS


def print_settings(request: Request, nodes: Sequence[Node], needed: Sequence[str]) -> None:
    """Prints every setting of the rows, the geometry of their sizes, and their run directories."""
    for row in request.rows:
        print(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(row))))
    sizes = {name: dataclasses.asdict(size) for node in nodes for name, size in sizes_of(node.recipe).items()}
    print("# geometry of the sizes")
    print(OmegaConf.to_yaml(OmegaConf.create({"sizes": sizes})))
    print("# run directories")
    for node in nodes:
        print(short(Path(request.cluster.runs) / node.id))
    _print_needed(needed)
    print_next([("see the plan", command("submit.py", *request.words, "--dry-run"))])


def print_plan(request: Request, nodes: Sequence[Node], plan: SharedPlan, needed: Sequence[str]) -> None:
    """Prints the stages with their batches, estimated cost and dependencies, and the sbatch calls."""
    rate = request.cluster.sustained_tflops
    hours = [gpu_hours(node.recipe, rate) for node in nodes]
    _print_stages(f"plan of {counted(len(request.rows), 'row')}", nodes, plan, hours)
    print(f"\n{_kind_counts(nodes)}")
    print_targets(request.rows)
    _print_given_weights(nodes)
    _print_cost(nodes, plan, sum(hours), rate)
    _print_groups(plan, rate)
    if not request.options.local:
        _print_arrays(request, nodes, plan)
    _print_needed(needed)
    accuracies = ("see the accuracies reached so far", command("report.py", *request.words))
    print_next([*_first_steps(request, needed), accuracies])


def print_targets(rows: Sequence[Row]) -> None:
    """Prints the target of each row that is not as it is defined in experiments/, and how it differs."""
    for row in rows:
        if differs := describe(row):
            print(f"{row.name}: target {target_text(row)}; {differs}")


def print_scripts(cluster: Cluster, nodes: Sequence[Node], plan: SharedPlan) -> None:
    """Prints the batch script of every sbatch call; folders that are made on submission have placeholders."""
    from launch.slurm.sbatch import script_text
    from launch.slurm.script import parameters

    runs = Path(cluster.runs)
    for array in build_arrays(nodes, plan.stages, {}, cluster, plan.groups):
        folder, code = runs / "jobs" / f"TIME-{array.stages[0].kind}-XXXX", runs / "code" / "COMMIT-XXXXXXXX"
        how = parameters(array, cluster, code, folder, array.dependency, cluster.slurm.excluded)
        print(f"# {array.name}: {', '.join(stage.id for stage in array.stages)}")
        print(script_text(folder, how, array.size))


def _print_stages(title: str, nodes: Sequence[Node], plan: SharedPlan, hours: Sequence[float]) -> None:
    number = {node.id: str(place) for place, node in enumerate(nodes, start=1)}
    together = {stage.id: f"{_group_memory(group):,.1f}, shared" for group in _groups(plan) for stage in group}
    columns = ["#>", "kind", "stage", "rows>", "GPUs>", "micro-batch x accumulation x GPUs", "length>"]
    columns += ["deepspeed", "GB per GPU>", "GPU-hours>", "days>", "after #"]
    lines = [
        [
            number[node.id],
            node.kind,
            node.id,
            str(len(node.rows)),
            str(stage.execution.world_size),
            _batch_text(stage),
            _length_text(node),
            "-" if node.kind == "test" else stage.execution.deepspeed,
            together.get(stage.id) or memory_text(stage),
            f"{cost:,.1f}",
            f"{cost / gpus_of(stage) / 24:,.1f}",
            ", ".join(number[parent] for parent in node.stage_parents) or "-",
        ]
        for node, stage, cost in zip(nodes, plan.stages, hours, strict=True)
    ]
    print_table(title, columns, lines)


def _print_cost(nodes: Sequence[Node], plan: SharedPlan, hours: float, rate: float) -> None:
    """Prints the GPU-hours and days of the plan. hours: of all stages alone."""
    days = days_until_complete(plan, rate)
    last = [max(group, key=lambda name: days[name]) for group in plan.groups]
    one_by_one = sum(days[node.id] for node in nodes if not any(node.id in group for group in plan.groups))
    saved = sum(saved_gpu_hours([stage.recipe for stage in members], rate) for members in _groups(plan))
    alone = f" ({hours:,.0f} without shared teachers)" if saved else ""
    print(
        f"about {hours - saved:,.0f} GPU-hours{alone} at {rate:g} TFLOP/s sustained per GPU "
        "(cluster.sustained_tflops), without decoding, validation and recomputed activations;\n"
        f"{one_by_one + sum(days[name] for name in last):,.1f} days one job after the other, "
        f"{_longest_chain(nodes, days):,.1f} if all that can run at the same time do"
    )


def _groups(plan: SharedPlan) -> list[list[Stage]]:
    return [[stage for stage in plan.stages if stage.id in group] for group in plan.groups]


def _print_groups(plan: SharedPlan, rate: float) -> None:
    """Prints which stages run together, what that saves of the GPU-hours above, and what memory it takes."""
    number = {stage.id: place for place, stage in enumerate(plan.stages, start=1)}
    for members in _groups(plan):
        recipes = [stage.recipe for stage in members]
        alone, saved = sum(gpu_hours(recipe, rate) for recipe in recipes), saved_gpu_hours(recipes, rate)
        numbers = ", ".join(str(number[stage.id]) for stage in members)
        print(
            f"stages {numbers} run together with one pass of their teachers: {alone - saved:,.0f} instead of "
            f"{alone:,.0f} GPU-hours, {saved:,.0f} saved; {_group_memory(members):,.1f} GB per GPU"
        )
    if plan.groups:
        print(
            "the next stages of a student start as soon as it is complete; "
            "cluster.pretrain.share_teachers=false runs all of them apart"
        )
    for sentence in plan.apart:
        print(sentence)


def _group_memory(members: Sequence[Stage]) -> float:
    """GB of each GPU for students in one job."""
    return memory_of_stages(members).total(members[0].execution.micro_batch) / GB


def memory_text(stage: Stage) -> str:
    """The counted memory of each GPU in training, and whether activations are recomputed; `-` for a test."""
    recipe, how = stage.recipe, stage.execution
    if isinstance(recipe, Test):
        return "-"
    memory = memory_of(recipe, how.world_size, how.deepspeed, how.precision).total(how.micro_batch)
    recomputed = ", checkpointed" if getattr(recipe, "activation_checkpointing", False) else ""
    return f"{memory / GB:,.1f}{recomputed}"


def _longest_chain(nodes: Sequence[Node], days: Mapping[str, float]) -> float:
    """Days of the longest chain of stages that wait for each other."""
    ends: dict[str, float] = {}
    for node in nodes:  # parents first
        ends[node.id] = days[node.id] + max((ends[parent] for parent in node.stage_parents), default=0.0)
    return max(ends.values())


def _print_arrays(request: Request, nodes: Sequence[Node], plan: SharedPlan) -> None:
    """Prints the sbatch calls for the stages that are not complete, assuming that none is queued yet."""
    number = {node.id: str(place) for place, node in enumerate(nodes, start=1)}
    missing = [stage for stage in plan.stages if not stage.files.read_result()]
    arrays = build_arrays(nodes, missing, {}, request.cluster, plan.groups)
    lines = [
        [
            array.name if array.size == 1 else f"{array.name}[0-{array.size - 1}]",
            ", ".join("+".join(number[stage.id] for stage in element) for element in array.elements),
            str(array.layout),
            array.dependency or "-",
        ]
        for array in arrays
    ]
    print()
    print_table(counted(len(arrays), "sbatch call"), ["array", "stages #", "nodes x GPUs", "after"], lines)
    if len(missing) < len(nodes):
        print(f"complete already: {len(nodes) - len(missing)} of {len(nodes)} stages")


def _print_given_weights(nodes: Sequence[Node]) -> None:
    """Prints the weights files that replace stages, and what is done to make them fit."""
    given = {(role, path): node.parents[role] for node in nodes for role, path in node.files.items()}
    for (role, path), content in given.items():
        digest = content.removeprefix("weights:")
        print(f"{role} weights given: {path} (sha256 {digest[:8]}...)")
    for note in notes_on_weights(nodes):
        print(note)


def _print_needed(needed: Sequence[str]) -> None:
    if needed:
        print(f"\nto set in the cluster profile before submitting (see {short(EXAMPLE)}):")
        for field in needed:
            print(f"  {field}")


def _first_steps(request: Request, needed: Sequence[str]) -> list[tuple[str, str]]:
    """What to do after reading a plan; a profile that exists is never overwritten."""
    if not needed:
        return [_start_command(request)]
    profile = ROOT / "cluster.yaml"
    if request.options.cluster or os.environ.get("MVD_CLUSTER") or profile.exists():
        return []
    return [("describe your machines and data", f"cp {short(EXAMPLE)} {short(profile)}")]


def _start_command(request: Request) -> tuple[str, str]:
    if request.options.local:
        return "run it on this machine", command("submit.py", *request.words, "--local")
    return "submit it to SLURM (or run it here with --local)", command("submit.py", *request.words)


def _kind_counts(nodes: Sequence[Node]) -> str:
    """For instance `7 pre-trainings, 14 fine-tunings, 14 tests`."""
    numbers = [sum(node.kind == kind for node in nodes) for kind in KINDS]
    return ", ".join(counted(number, noun) for number, noun in zip(numbers, NOUNS, strict=True) if number)


def _batch_text(stage: Stage) -> str:
    how = stage.execution
    if stage.kind == "test":
        return f"{how.micro_batch} views x {how.world_size}"
    total = how.micro_batch * how.accumulation * how.world_size
    return f"{how.micro_batch} x {how.accumulation} x {how.world_size} = {total}"


def _length_text(node: Node) -> str:
    if isinstance(node.recipe, Test):
        return f"{node.recipe.clips} x {node.recipe.crops} views"
    return counted(node.recipe.optimization.epochs, "epoch")
