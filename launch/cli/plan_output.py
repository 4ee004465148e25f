"""What submit.py prints before anything runs: every setting (--show), or the plan (--dry-run)."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from launch.cli.output import command, counted, print_next, print_table, short
from launch.cli.parser import Request
from launch.cli.plan_cost import group_memory, print_groups, print_totals
from launch.cluster import EXAMPLE, ROOT, Cluster
from launch.plan.arrays import build_arrays
from launch.plan.differences import describe, target_text
from launch.plan.graph import Node
from launch.plan.rehearsed import costs
from launch.plan.resolve import build_stage
from launch.plan.together import SharedPlan, gpus_of
from launch.plan.weights import notes_on_weights
from mvd.config import KINDS, Row, Test
from mvd.host import count_gpus
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
    print_next([("see the plan", command("submit.py", *request.plan_words, "--dry-run"))])


def print_plan(request: Request, nodes: Sequence[Node], plan: SharedPlan, needed: Sequence[str]) -> None:
    """Prints the stages with their batches, estimated cost and dependencies, and the sbatch calls."""
    rate = request.cluster.sustained_tflops
    apart = [build_stage(node, request.cluster) for node in nodes]  # as they are rehearsed
    found = costs(nodes, apart, request.cluster, request.options.local)
    _print_stages(f"plan of {counted(len(request.rows), 'row')}", nodes, plan, [cost.gpu_hours for cost in found])
    print(f"\n{_kind_counts(nodes)}")
    print_targets(request.rows)
    _print_given_weights(nodes)
    if request.options.local and not count_gpus():
        print(f"no GPU is here: planned for the CPU, processes per stage: {request.cluster.gpus_per_node}")
    print_totals(nodes, plan, found, rate)
    print_groups(plan, found, rate)
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
    together = {stage.id: f"{group_memory(group):,.1f}, shared" for group in plan.missing_members() for stage in group}
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


def memory_text(stage: Stage) -> str:
    """The counted memory of each GPU in training, and whether activations are recomputed; `-` for a test."""
    recipe, how = stage.recipe, stage.execution
    if isinstance(recipe, Test):
        return "-"
    memory = memory_of(recipe, how.world_size, how.deepspeed, how.precision).total(how.micro_batch)
    recomputed = ", checkpointed" if getattr(recipe, "activation_checkpointing", False) else ""
    return f"{memory / GB:,.1f}{recomputed}"


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
    return [("describe your machines and data", shlex.join(["cp", short(EXAMPLE), short(profile)]))]


def _start_command(request: Request) -> tuple[str, str]:
    if request.options.local:
        return "run it on this machine", command("submit.py", *request.plan_words, "--local")
    return "submit it to SLURM (or run it here with --local)", command("submit.py", *request.plan_words)


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
