"""Submits rows of the paper, or your own, to SLURM: finds their stages, checks them and submits what is missing.

A complete stage is skipped, a queued or running one becomes a dependency, and a failed one resumes from its last
checkpoint. With --local the stages run on this machine, one after the other.

TARGET is a row or a suite: experiments/vith_k400, vith_k400, experiments/all, or the path of your own row file.
KEY=VALUE changes the rows (pretrain.optimization.epochs=2, finetune.seed=1, teachers=train) or the cluster profile
(cluster.gpus_per_node=4).
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.layouts import print_layouts
from launch.cli.parser import Parser, Request, run_command
from launch.cli.plan_output import print_plan, print_scripts, print_settings
from launch.cluster import EXAMPLE
from launch.plan.graph import Node, build_graph
from launch.plan.resolve import missing_settings
from launch.plan.together import plan_together
from mvd.config import KINDS, ConfigError
from mvd.stage import Stage

EXAMPLES = """examples:
  python launch/submit.py experiments/vith_k400                    all stages of a row, as SLURM jobs
  python launch/submit.py experiments/demo --local                 the whole method at small scale, on this machine
  python launch/submit.py experiments/all --dry-run                the plan of all fourteen rows
  python launch/submit.py experiments/vith_k400 --dry-run --script the sbatch scripts that an administrator may ask for
  python launch/submit.py experiments/vith_k400 --layouts          micro-batch, memory and days on 1, 2, 4, 8 nodes
  python launch/submit.py experiments/vith_k400 --rehearse         try and measure every different stage in short jobs
  python launch/submit.py experiments/vith_k400 --show             all settings of a row
  python launch/submit.py vitb_from_vitb_k400 teachers=train --dry-run
  python launch/submit.py demo finetune.seed=1 --local --until pretrain
  python launch/submit.py vits_from_vitb_k400 vitb_from_vitb_k400 --dry-run            two students, teachers shared
"""


def main(argv: Sequence[str]) -> int:
    """Checks the whole request, then prints or runs it; returns the exit code."""
    request = build_parser().read(argv)
    options = request.options
    if options.local:
        from launch.local.run import this_machine

        request = dataclasses.replace(request, cluster=this_machine(request.cluster))
    nodes = build_graph(request.rows, options.until)
    if not nodes:
        raise ConfigError(
            f"the given weights replace all stages up to {options.until}, so nothing is left to run; omit --until"
        )
    if options.rehearse:
        from launch.rehearsal import rehearse

        return rehearse(request, nodes)
    if options.layouts:
        print_layouts(request, nodes)
        return 0
    needed = missing_settings(nodes, request.cluster)
    plan = plan_together(nodes, request.cluster, options.together)
    if options.force and (options.show or options.dry_run):
        raise ConfigError("--force changes the runs folder, so it cannot be combined with --show or --dry-run; omit it")
    if options.script and (options.local or not options.dry_run):
        raise ConfigError("--script prints what --dry-run would submit to SLURM; add --dry-run, and omit --local")
    if options.show:
        print_settings(request, nodes, needed)
    elif options.script:
        print_scripts(request.cluster, nodes, plan)
        for field in needed:
            print(f"to set in the cluster profile before submitting: {field}", file=sys.stderr)
    elif options.dry_run:
        print_plan(request, nodes, plan, needed)
    elif needed:
        raise ConfigError(f"the cluster profile must set {needed[0]} (see {EXAMPLE})")
    else:
        return start(request, nodes, plan.stages, plan.groups)
    return 0


def start(
    request: Request, nodes: Sequence[Node], stages: Sequence[Stage], groups: Sequence[Sequence[str]] = ()
) -> int:
    """Runs the stages on this machine, or submits them; returns the exit code."""
    if request.options.force:
        from launch.cli.force import forced_stage, move_aside
        from launch.slurm.submit import require_slurm

        forced_stage(request.options.force, stages)
        if not request.options.local:
            require_slurm(request)
        move_aside(request.options.force, nodes, stages)
    if request.options.local:
        from launch.local.run import run_plan

        return run_plan(request, nodes, stages, groups)
    from launch.slurm.submit import submit_plan

    return submit_plan(request, nodes, stages, groups)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser("submit.py", __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--until", choices=KINDS, default="test", metavar="KIND", help=f"last kind of stage to run: {', '.join(KINDS)}"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine's GPUs, or on its CPU")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="try every different stage in a short job, and print what that measured; the plan uses it from then on. "
        "With --dry-run: print what would be rehearsed",
    )
    parser.add_argument(
        "--force", metavar="STAGE", help="start this stage (a kind, or a name from the plan) from scratch"
    )
    parser.add_argument(
        "--together",
        action="append",
        default=[],
        metavar="ROW,ROW",
        help="pre-trainings to run in one job with one pass of their teachers, instead of all that can; "
        "may be repeated",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print all settings of the rows and exit")
    instead.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    instead.add_argument(
        "--layouts", action="store_true", help="print micro-batch, memory and days on 1, 2, 4 and 8 nodes and exit"
    )
    parser.add_argument("--script", action="store_true", help="with --dry-run: print the sbatch scripts of the plan")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
