"""Compares each row's accuracy with its target, from the run directories alone.

Give the same KEY=VALUE settings as to submit.py: a changed recipe has other run directories. Without TARGET, every run
of the runs folder is listed, with the settings in which runs of one row differ. --html writes all details into one page
that needs no network: curves, cost, accuracy per class, confusion matrix, surest mistakes and provenance.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next, print_table, short, tensorboard
from launch.cli.parser import Parser, Request, run_command
from launch.job.record import option_of, read_record
from launch.plan.differences import noted_rows, target_text
from launch.reporting.goodput import COLUMNS as GOODPUT
from launch.reporting.goodput import goodput_lines
from launch.reporting.results import (
    RowResult,
    attempt,
    checked_result,
    row_result,
    seeds_text,
    spent_gpu_hours,
    spread,
)
from launch.reporting.run_settings import Run, differing, read_runs
from launch.stage_state import result_text
from mvd.config import ConfigError

EXAMPLES = """examples:
  python launch/report.py                        every run of the runs folder
  python launch/report.py experiments/demo
  python launch/report.py experiments/demo --html report.html
  python launch/report.py experiments/all --markdown > results.md
"""
COLUMNS = ["row", "target top-1 / top-5 %>", "reached top-1 / top-5 %>", "95 % interval>", "top-1 difference>"]
COLUMNS += ["epochs done", "GPU-hours>", "run directory"]
RUN_COLUMNS = [
    "run",
    "target top-1 / top-5 %>",
    "result",
    "95 % interval>",
    "GPU-hours>",
    "differs in",
    "run directory",
]


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code, 2 if a file could not be read."""
    request = build_parser().read(argv, needs_target=False)
    options = request.options
    if not request.rows:
        if options.html or options.markdown:
            raise ConfigError("no TARGET given; add the rows of the report, such as experiments/demo")
        return list_runs(request)
    if options.html is not None:
        check_page(options.html)
    results = row_results(request)
    if options.markdown:
        print(markdown([cells(result) for result in results]))
        print_notes(results)
    else:
        print_report(results)
    if options.html is not None:
        from launch.reporting.page import write_page  # imports matplotlib, and torch for the logits

        write_page(options.html, results)
        print(f"\n{options.html}: open it in any browser; it is one file and needs no network")
    if not options.markdown:
        page = command("report.py", *request.words, "--html", "report.html")
        begun = {stage.node.id: stage.files for result in results for stage in result.stages if stage.started}
        records = [attempt(partial(read_record, files), results[0].problems) for files in begun.values()]
        steps = [("run what is not finished", command("submit.py", *request.words, *option_of(records)))]
        steps += [] if options.html else [("write all details into one page", page)]
        print_next([*steps, ("see the curves", tensorboard(request.cluster.runs))])
    return _exit_code([problem for result in results for problem in result.problems])


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser("report.py", __doc__ or "", EXAMPLES)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with all details")
    return parser


def check_page(path: Path) -> None:
    """Raises ConfigError for a page that cannot be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html must be a file that ends in .html, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html: there is no folder {path.absolute().parent}; create it first")


def row_results(request: Request) -> list[RowResult]:
    """What the rows of a command line have reached."""
    runs = Path(request.cluster.runs)
    known, _ = read_runs(runs)  # what cannot be read may belong to other rows
    return [row_result(row, runs, known) for row in request.rows]


def cells(result: RowResult) -> list[str]:
    """The cells of one row of the table."""
    found, target = result.result, result.row.target
    started = [stage for stage in result.stages if stage.started]
    progress = ", ".join(f"{s.node.kind} {s.epochs_done}/{s.epochs}" for s in result.stages if s.epochs is not None)
    return [
        result.row.name,
        target_text(result.row),
        f"{found['top1']:.1f} / {found['top5']:.1f}" if found else "-",
        interval_text(found),
        f"{found['top1'] - target.top1:+.1f}" if found and target else "-",
        progress if started else "not started",
        hours_text(result.gpu_hours),
        short(started[-1].files.path) if started else "-",
    ]


def interval_text(result: dict[str, object] | None) -> str:
    """The 95 % interval of a test's top-1, as `82.0 - 89.6`."""
    bounds = (result or {}).get("top1_interval")
    return f"{bounds[0]:.1f} - {bounds[1]:.1f}" if isinstance(bounds, list) else "-"


def hours_text(hours: float | None) -> str:
    """GPU-hours; `-` if they are not known."""
    return "-" if hours is None else f"{hours:,.1f}"


def print_report(results: Sequence[RowResult]) -> None:
    """Prints the table, and the notes below it."""
    print_table("accuracy", COLUMNS, [cells(result) for result in results])
    lines = goodput_lines(results)
    if lines:
        print_table("goodput: what the jobs' time went into", [name.rstrip("#") for name in GOODPUT], lines)
    print_notes(results)


def print_notes(results: Sequence[RowResult]) -> None:
    """Prints the spread over seeds, speed, differences from the paper, unreadable videos and files, one line each."""
    for result in results:
        name, seeds = result.row.name, result.seeds
        if len(seeds) > 1:
            top1, top5 = spread(seeds, "top1"), spread(seeds, "top5")
            print(f"\n{name}: {len(seeds)} seeds ({seeds_text(seeds)}): top-1 {top1} %, top-5 {top5} %")
        speeds = [f"{stage.node.kind} {stage.speed}" for stage in result.stages if stage.speed]
        if speeds:
            print(f"\n{name}: {', '.join(speeds)}")
        if result.differs:
            print(f"\n{name}: {result.differs}")
        unreadable = result.result["unreadable"] if result.result else []
        if unreadable:
            names = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
            print(f"\n{name}: {len(unreadable)} videos could not be read and count as wrong: {names}")


def list_runs(request: Request) -> int:
    """Prints every run of the runs folder that no other one starts from; returns the exit code."""
    runs = Path(request.cluster.runs)
    known, problems = read_runs(runs)
    used = {parent for run in known for parent in run.parents}
    results = {run.id: attempt(partial(checked_result, run.files, run.stage.kind == "test"), problems) for run in known}
    hours, settings = hours_with_parents(known, results), differing(known)
    lines = []
    for run in known:
        if run.id in used:
            continue
        result = results[run.id]
        noted = noted_rows(run.files).values()
        targets = {f"{t['top1']:.1f} / {t['top5'] or '-'} ({t['source']})" for row in noted if (t := row.get("target"))}
        differs = {row["differs"] for row in noted if row.get("differs")}
        lines.append(
            [
                run.group,
                ", ".join(sorted(targets)) or "-",
                result_text(result) if result else "not complete",
                interval_text(result),
                hours_text(hours[run.id]),
                "; ".join(filter(None, [settings[run.id], *sorted(differs)])) or "-",
                short(run.files.path),
            ]
        )
    print_table(f"runs in {short(runs)}", RUN_COLUMNS, lines)
    print_next([("see the state of every stage", command("status.py", *request.words))])
    return _exit_code(problems)


def hours_with_parents(known: Sequence[Run], results: Mapping[str, dict[str, Any] | None]) -> dict[str, float | None]:
    """Id -> GPU-hours of a run and of all runs that it starts from; None if none of them recorded it.

    known: parents before children. results: id -> content of result.json.
    """
    own = {run.id: spent_gpu_hours(run.files, results[run.id]) for run in known}
    lines: dict[str, set[str]] = {}
    for run in known:
        lines[run.id] = {run.id}.union(*(lines[parent] for parent in run.parents))
    spent = {name: [hours for other in line if (hours := own[other]) is not None] for name, line in lines.items()}
    return {name: sum(hours) if hours else None for name, hours in spent.items()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table."""
    head = [column.rstrip(">") for column in COLUMNS]
    rule = ["---:" if column.endswith(">") else "---" for column in COLUMNS]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def _exit_code(problems: Sequence[str]) -> int:
    """2 if there are problems, after printing each, as of a command that fails because of one."""
    sys.stdout.flush()
    for problem in dict.fromkeys(problems):  # rows that share a stage name the same
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
