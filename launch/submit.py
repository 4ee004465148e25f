"""Submits rows of the paper, or your own, to SLURM: finds their stages, checks them, submits what is missing.

A stage that is complete is skipped, one that is queued or running already is attached to, and one that has failed goes
on from its checkpoint. With --local the stages run here, one after the other.

TARGET is a row or a suite: experiments/vith_k400, vith_k400, experiments/all, or a path to a row file of your own.
KEY=VALUE changes the rows (pretrain.optimization.epochs=2, finetune.seed=1, teachers=train) or the cluster profile
(cluster.gpus_per_node=4).
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next, print_table, short
from launch.cli.parser import Parser, Request, run_command
from launch.cluster import ROOT
from launch.plan.graph import Node, build_graph
from launch.plan.resolve import build_stage, missing_settings
from launch.plan.weights import notes_on_weights
from mvd.config import KINDS, ConfigError, Test
from mvd.identity import sizes_of
from mvd.stage import Stage

EXAMPLES = """examples:
  python launch/submit.py experiments/vith_k400                    everything the row needs, as SLURM jobs
  python launch/submit.py experiments/demo --local                 the whole method in small, on this machine
  python launch/submit.py experiments/all --dry-run                the plan of all fourteen rows
  python launch/submit.py experiments/vith_k400 --show             every setting of a row
  python launch/submit.py vitb_from_vitb_k400 teachers=train --dry-run
  python launch/submit.py demo finetune.seed=1 --local --until pretrain
"""


def main(argv: Sequence[str]) -> int:
    """Checks the whole request, then shows, plans or runs it; returns the exit code."""
    request = build_parser().read(argv)
    options = request.options
    if options.local:
        from launch.local.run import this_machine

        request = dataclasses.replace(request, cluster=this_machine(request.cluster))
    nodes = build_graph(request.rows, options.until)
    if not nodes:
        raise ConfigError(f"with these weights given, nothing is left to run until {options.until}; leave --until out")
    needed = missing_settings(nodes, request.cluster)
    stages = [build_stage(node, request.cluster) for node in nodes]
    if options.force and (options.show or options.dry_run):
        raise ConfigError("--force changes the runs folder, so it does not go with --show or --dry-run; leave it out")
    if options.show:
        show(request, nodes, needed)
    elif options.dry_run:
        print_plan(request, nodes, stages, needed)
    elif needed:
        raise ConfigError(f"the cluster profile does not set {needed[0]}; see cluster.example.yaml")
    else:
        return start(request, nodes, stages)
    return 0


def start(request: Request, nodes: Sequence[Node], stages: Sequence[Stage]) -> int:
    """Runs the stages here, or submits them; returns the exit code."""
    if request.options.force:
        from launch.cli.force import move_aside

        move_aside(request.options.force, nodes, stages)
    if request.options.local:
        from launch.local.run import run_plan

        return run_plan(request, stages)
    from launch.slurm.submit import submit_plan

    return submit_plan(request, nodes, stages)


def build_parser() -> Parser:
    parser = Parser("submit.py", __doc__ or "", EXAMPLES)
    parser.add_argument("--until", choices=KINDS, default="test", metavar="KIND", help=f"stop after {', '.join(KINDS)}")
    parser.add_argument("--local", action="store_true", help="run on this machine's GPUs, or on its CPU")
    parser.add_argument(
        "--force", metavar="STAGE", help="redo this stage (a kind, or a name from the plan) from its start"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print every setting of the rows, and run nothing")
    instead.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    return parser


def show(request: Request, nodes: Sequence[Node], needed: Sequence[str]) -> None:
    """Prints every setting of the rows, and where their stages run."""
    from omegaconf import OmegaConf

    for row in request.rows:
        print(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(row))))
    sizes = {name: dataclasses.asdict(size) for node in nodes for name, size in sizes_of(node.recipe).items()}
    print("# what the sizes stand for")
    print(OmegaConf.to_yaml(OmegaConf.create({"sizes": sizes})))
    print("# run directories")
    for node in nodes:
        print(short(Path(request.cluster.runs) / node.id))
    print_needed(needed)
    print_next([("see the plan", command("submit.py", *request.words, "--dry-run"))])


def print_plan(request: Request, nodes: Sequence[Node], stages: Sequence[Stage], needed: Sequence[str]) -> None:
    """Prints the stages with their batches, estimated cost and order."""
    from mvd.flops import gpu_hours

    number = {node.id: str(place) for place, node in enumerate(nodes, start=1)}
    rate = request.cluster.sustained_tflops
    hours = [gpu_hours(node.recipe, rate) for node in nodes]
    columns = ["#>", "kind", "stage", "rows>", "GPUs>", "micro-batch x accumulation x GPUs", "length>"]
    columns += ["deepspeed", "GPU-hours>", "after #"]
    lines = [
        [
            number[node.id],
            node.kind,
            node.id,
            str(len(node.rows)),
            str(stage.execution.world_size),
            batch_text(stage),
            length_text(node),
            "-" if node.kind == "test" else stage.execution.deepspeed,
            f"{cost:,.1f}",
            ", ".join(number[parent] for parent in node.stage_parents) or "-",
        ]
        for node, stage, cost in zip(nodes, stages, hours, strict=True)
    ]
    print_table(f"plan of {count(len(request.rows), 'row')}", columns, lines)
    print(f"\n{stage_counts(nodes)}")
    print_given(nodes)
    print(
        f"about {sum(hours):,.0f} GPU-hours at {rate:g} TFLOP/s sustained per GPU (cluster.sustained_tflops); "
        "decoding, validation and recomputed activations come on top"
    )
    if not request.options.local:
        print_arrays(request, nodes, stages)
    print_needed(needed)
    profile = f"cp {short(ROOT / 'cluster.example.yaml')} {short(ROOT / 'cluster.yaml')}"
    steps = [("describe your machines and data", profile)] if needed else [_start_command(request)]
    print_next([*steps, ("see what has been reached", command("report.py", *request.words))])


def print_given(nodes: Sequence[Node]) -> None:
    """Names the files that are given instead of a stage."""
    given = {(role, path): node.parents[role] for node in nodes for role, path in node.files.items()}
    for (role, path), content in given.items():
        word, _, digest = content.partition(":")
        print(f"{role} {word} given: {path} (sha256 {digest[:8]}...)")
    for note in notes_on_weights(nodes):
        print(note)


def _start_command(request: Request) -> tuple[str, str]:
    if request.options.local:
        return "run it on this machine", command("submit.py", *request.words, "--local")
    return "submit it to SLURM (or run it here with --local)", command("submit.py", *request.words)


def print_arrays(request: Request, nodes: Sequence[Node], stages: Sequence[Stage]) -> None:
    """Prints the calls of sbatch for the stages that are not complete, as if none of them were queued yet."""
    from launch.plan.arrays import build_arrays

    number = {node.id: str(place) for place, node in enumerate(nodes, start=1)}
    missing = [stage for stage in stages if not stage.files.read_result()]
    arrays = build_arrays(nodes, missing, {}, request.cluster)
    lines = [
        [
            array.name if array.size == 1 else f"{array.name}[0-{array.size - 1}]",
            ", ".join(number[stage.id] for stage in array.stages),
            str(array.layout),
            array.dependency or "-",
        ]
        for array in arrays
    ]
    print()
    print_table(f"{count(len(arrays), 'call')} of sbatch", ["array", "stages #", "nodes x GPUs", "after"], lines)
    if len(missing) < len(stages):
        print(f"complete already: {len(stages) - len(missing)} of {len(stages)} stages")


def stage_counts(nodes: Sequence[Node]) -> str:
    """For instance `7 pre-trainings, 14 fine-tunings, 14 tests`."""
    words = ("image teacher", "video teacher", "pre-training", "fine-tuning", "test")
    numbers = [sum(node.kind == kind for node in nodes) for kind in KINDS]
    return ", ".join(count(number, word) for number, word in zip(numbers, words, strict=True) if number)


def count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def batch_text(stage: Stage) -> str:
    how = stage.execution
    if stage.kind == "test":
        return f"{how.micro_batch} views x {how.world_size}"
    total = how.micro_batch * how.accumulation * how.world_size
    return f"{how.micro_batch} x {how.accumulation} x {how.world_size} = {total}"


def length_text(node: Node) -> str:
    if isinstance(node.recipe, Test):
        return f"{node.recipe.clips} x {node.recipe.crops} views"
    return count(node.recipe.optimization.epochs, "epoch")


def print_needed(needed: Sequence[str]) -> None:
    if needed:
        print("\nneeded before submitting, in the cluster profile (see cluster.example.yaml):")
        for field in needed:
            print(f"  {field}")


if __name__ == "__main__":
    sys.exit(run_command(main))
