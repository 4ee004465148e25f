"""Sets what rows have reached beside what they were to reach; reads the run directories and nothing else.

Settings matter here too: another recipe has other run directories.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.plan import build_graph
from launch.request import Parser, run_command
from launch.screen import command, print_next, print_table, short
from mvd.config import ConfigError, Row, Test

EXAMPLES = """examples:
  python launch/report.py experiments/demo
  python launch/report.py experiments/all --markdown > results.md
"""
COLUMNS = ["row", "target top-1 / top-5 %>", "reached top-1 / top-5 %>", "top-1 difference>", "epochs done"]
COLUMNS += ["run directory"]


@dataclass(frozen=True)
class Line:
    """What is known of one row."""

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
            ("run what is not finished", command("submit.py", *request.words, "--local")),
            ("see the curves", f"tensorboard --logdir {short(request.cluster.runs)}"),
        ]
    )
    return 0


def report_line(row: Row, runs: Path) -> Line:
    """Reads the run directories of a row's stages."""
    nodes = build_graph([row])
    result = next((read_result(runs / node.id) for node in nodes if node.kind == "test"), None)
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


def read_result(directory: Path) -> dict[str, Any] | None:
    """A complete stage's result.json, or None.

    Raises:
        ConfigError: the file is damaged.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged; delete it and run the stage again") from error


def result_text(result: dict[str, Any]) -> str:
    """What a stage's result.json says it reached, with the split each accuracy belongs to."""
    if "top1" in result:
        return f"test top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %"
    loss = f"training loss {result['loss']:.4f}" if result.get("loss") is not None else "no loss"
    return f"{loss}, validation top-1 {result['val_top1']:.1f} %" if "val_top1" in result else loss


def print_report(lines: Sequence[Line]) -> None:
    print_table("accuracy", COLUMNS, [line.cells for line in lines])
    print_unreadable(lines)


def print_unreadable(lines: Sequence[Line]) -> None:
    """Names the test videos that could not be read."""
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
    """Epochs that are surely over: all of a complete stage, or those before the one in the newest metrics line."""
    result = read_result(directory)
    if result:
        return result["epochs"]
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["epoch"] - 1 if whole else 0


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
