"""Compares each row's accuracy with its target, from the run directories alone.

Give the same KEY=VALUE settings as to submit.py: a changed recipe has other run directories.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next, print_table, short, tensorboard
from launch.cli.parser import Parser, run_command
from launch.plan.graph import build_graph
from mvd.config import Row, Test
from mvd.run_directory import RunDirectory

EXAMPLES = """examples:
  python launch/report.py experiments/demo
  python launch/report.py experiments/all --markdown > results.md
"""
COLUMNS = ["row", "target top-1 / top-5 %>", "reached top-1 / top-5 %>", "top-1 difference>", "epochs done"]
COLUMNS += ["run directory"]


@dataclass(frozen=True)
class Line:
    """One line of the report: its cells, and the test videos that could not be read."""

    cells: list[str]
    unreadable: list[str]


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    parser = Parser("report.py", __doc__ or "", EXAMPLES)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    request = parser.read(argv)
    lines = [report_line(row, Path(request.cluster.runs)) for row in request.rows]
    if request.options.markdown:
        print(markdown([line.cells for line in lines]))
        print_unreadable(lines)
        return 0
    print_report(lines)
    print_next(
        [
            ("run what is not finished", command("submit.py", *request.words)),
            ("see the curves", tensorboard(request.cluster.runs)),
        ]
    )
    return 0


def report_line(row: Row, runs: Path) -> Line:
    """The line of one row, from the run directories of its stages."""
    nodes = build_graph([row])
    result = next((RunDirectory(runs / node.id).read_result() for node in nodes if node.kind == "test"), None)
    target = row.target
    goal = f"{_percent(target.top1)} / {_percent(target.top5)} ({target.source})" if target else "-"
    reached = f"{_percent(result['top1'])} / {_percent(result['top5'])}" if result else "-"
    difference = f"{result['top1'] - target.top1:+.1f}" if result and target else "-"
    started = [node.id for node in nodes if (runs / node.id).is_dir()]
    trainings = [(node, node.recipe.optimization.epochs) for node in nodes if not isinstance(node.recipe, Test)]
    progress = ", ".join(f"{node.kind} {_epochs_done(runs / node.id)}/{epochs}" for node, epochs in trainings)
    where = short(runs / started[-1]) if started else "-"
    cells = [row.name, goal, reached, difference, progress if started else "not started", where]
    return Line(cells, result["unreadable"] if result else [])


def print_report(lines: Sequence[Line]) -> None:
    """Prints the table, and the unreadable videos below it."""
    print_table("accuracy", COLUMNS, [line.cells for line in lines])
    print_unreadable(lines)


def print_unreadable(lines: Sequence[Line]) -> None:
    """Lists the test videos that could not be read."""
    for line in lines:
        if line.unreadable:
            names = ", ".join(line.unreadable[:5]) + (", ..." if len(line.unreadable) > 5 else "")
            print(f"\n{line.cells[0]}: {len(line.unreadable)} videos could not be read and count as wrong: {names}")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table."""
    head = [column.rstrip(">") for column in COLUMNS]
    rule = ["---:" if column.endswith(">") else "---" for column in COLUMNS]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _epochs_done(directory: Path) -> int:
    """Completed epochs: all of a complete stage, else those before the epoch in the newest metrics line."""
    result = RunDirectory(directory).read_result()
    if result:
        return int(result["epochs"])
    metrics = RunDirectory(directory).read_metrics()
    return int(metrics[-1]["epoch"]) - 1 if metrics else 0


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
