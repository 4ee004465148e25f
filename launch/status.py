"""Shows the state of stages, one line each, from run directories and SLURM. Changes nothing.

TARGET is a row, a suite, or the name of a run directory; the default is every stage of the runs folder, with the
settings in which stages of the same name differ.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, counted, print_next, print_table, sentence_of, short
from launch.cli.parser import Parser, Request, run_command
from launch.job.record import option_of
from launch.plan.differences import describe, target_text
from launch.plan.graph import build_graph
from launch.reporting.run_settings import differing, read_runs
from launch.stage_state import faults_of, from_plan, from_runs, stage_states
from mvd.config import ConfigError

EXAMPLES = """examples:
  python launch/status.py                        every stage of the runs folder
  python launch/status.py experiments/k400
  python launch/status.py experiments/vith_k400 --watch
"""
COLUMNS = ["row", "stage", "state", "job", "nodes>", "run directory"]
SECONDS_BETWEEN = 30


def main(argv: Sequence[str]) -> int:
    """Prints the table, once or repeatedly; returns the exit code."""
    parser = Parser("status.py", __doc__ or "", EXAMPLES, takes_stages=True)
    parser.add_argument("--watch", action="store_true", help=f"print again every {SECONDS_BETWEEN} s until Ctrl-C")
    request = parser.read(argv, needs_target=False)
    try:
        while True:
            try:
                show(request)
            except (ConfigError, OSError) as error:  # of a network disk, for instance
                if not request.options.watch:
                    raise
                print(f"error: {sentence_of(error)}; next try in {SECONDS_BETWEEN} s", flush=True)
            if not request.options.watch:
                return 0
            time.sleep(SECONDS_BETWEEN)
            print("\033[2J\033[H" if sys.stdout.isatty() else "", end="")
    except KeyboardInterrupt:
        return 130


def show(request: Request) -> None:
    """Prints the state and the faults of every stage, and the next commands."""
    runs = Path(request.cluster.runs)
    stages = from_plan(build_graph(request.rows))
    if request.stages or not request.rows:
        stages += [stage for stage in from_runs(runs) if not request.stages or stage.id in request.stages]
    states = stage_states(stages, runs)
    settings = {} if request.rows else differing(read_runs(runs)[0])
    lines = []
    for stage in stages:
        state = states[stage.id]
        rows = f"{stage.rows[0]} + {len(stage.rows) - 1}" if len(stage.rows) > 1 else "".join(stage.rows)
        job, nodes = (state.record.job_id, str(state.record.nodes)) if state.record else ("-", "-")
        directory = runs / stage.id
        lines.append([rows or "-", stage.id, state.text, job, nodes, short(directory) if directory.exists() else "-"])
        if settings:
            lines[-1].append(settings.get(stage.id) or "-")
    print_table(counted(len(stages), "stage"), COLUMNS + (["differs in"] if settings else []), lines)
    for row in request.rows:
        if differs := describe(row):
            print(f"\n{row.name}: target {target_text(row)}; {differs}")
    faults = {stage.id: faults_of(runs / stage.id) for stage in stages if states[stage.id].word != "done"}
    if any(faults.values()):
        print("\nfaults so far:")
        print("\n".join(f"  {stage}: {text}" for stage, text in faults.items() if text))
    steps = [("print the accuracies", command("report.py", *request.row_words))]
    ended = [state.record for state in states.values() if state.lost or state.word == "stopped"]
    if ended and request.rows:
        again = command("submit.py", *request.row_words, *option_of(ended))
        steps = [("once the cause is fixed, submit what is missing", again), *steps]
    running = [stage for stage, state in states.items() if state.word == "running"]
    if running:
        chosen = [] if request.rows or request.stages else running[:1]
        steps = [("follow a log", command("logs.py", *request.words, *chosen, "--follow")), *steps]
    print_next(steps if stages else [("run something", command("submit.py", "experiments/demo", "--local"))])


if __name__ == "__main__":
    sys.exit(run_command(main))
