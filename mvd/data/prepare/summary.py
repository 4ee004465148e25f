"""What prepare prints at its end: counts, reasons, and the next steps."""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mvd.config import DATASETS
from mvd.data.prepare.class_numbers import base_of
from mvd.data.prepare.row_file import Written
from mvd.data.prepare.write_lists import Counts, Quarantined, paper_count, printable
from mvd.host import python_command

STUDENT = "student.pth"  # stands for the weights of a distilled student
WIDTH = 160  # columns, where the output is not a terminal


def print_summary(
    counts: Counts, quarantined: Sequence[Quarantined], left_out: Counter[str], dataset: str | None, classes: int
) -> None:
    """Prints the videos of each split, the reasons of those that are quarantined, and what is left out."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=WIDTH, highlight=False, markup=False)
    table = _table("split", "listed>", "good>", "broken>", "missing>", "repeated>", "the paper's list>")
    for split, values in counts.items():
        paper = paper_count(dataset, split)
        numbers = (f"{values[name]:,}" for name in ("listed", "good", "broken", "missing", "repeated"))
        table.add_row(split, *numbers, "-" if paper is None else f"{paper:,}")
    console.print(f"{classes} classes", table)
    if quarantined:
        console.print(_reasons(quarantined))
    if left_out:
        kinds = ", ".join(f"{number:,} x {kind}" for kind, number in sorted(left_out.items()))
        console.print(printable(f"not videos of the data set: {kinds}"))
    temporary = sum(item.temporary for item in quarantined)
    if temporary:
        console.print(
            f"{temporary:,} of the broken videos may be good: the disk or the machine failed, not the file; run the "
            "same command again, which checks them again"
        )


def _table(*columns: str) -> Table:
    """A table; columns whose name ends in `>` are aligned to the right."""
    table = Table()
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def _reasons(quarantined: Sequence[Quarantined]) -> Table:
    """The reasons, most frequent first; those that differ in numbers only are one."""
    groups: dict[tuple[str, str], list[Quarantined]] = defaultdict(list)
    for item in quarantined:
        groups[item.kind, re.sub(r"\d+", "0", item.reason)].append(item)
    table = _table("quarantined", "videos>", "why", "for instance")
    for (kind, _), items in sorted(groups.items(), key=lambda group: -len(group[1])):
        first = items[0]
        table.add_row(kind, f"{len(items):,}", printable(first.reason), printable(first.name))
    return table


def profile_name(dataset: str | None, output: Path) -> str:
    """The data set's name in the cluster profile and in row files; the paper's names are not for own data."""
    own = re.sub(r"[^A-Za-z0-9_-]", "_", output.name)
    return dataset or (f"my_{own}" if own in DATASETS else own)


def print_next(dataset: str | None, output: Path, row: Written | None) -> None:
    """Prints what to write into the cluster profile, what the row costs, and the next commands."""
    name = profile_name(dataset, output)
    if row is not None:
        print(f"\nrow file: {row.file}{' (there already, left as it is)' if row.kept else ''}\n{row.cost}")
        if row.needs_weights:
            print("it starts from a distilled student: give its weights, or else the plan begins with the distillation")
        if row.outdated:
            print(f"the videos have changed: set {', '.join(row.outdated)} in the row file, which makes it a new run")
    print(f"\nnext:\n  name it in cluster.yaml:\n    datasets: {{{name}: {{root: {output}}}}}")
    if dataset is None and row is None:
        print("  add videos: a row needs at least two for training and one for validation (--val-share, or --val LIST)")
        return
    target = _target(name) if row is None else shlex.quote(os.path.relpath(row.file))
    place = "" if row is None else f" --data {shlex.quote(os.path.relpath(output))}"
    print(f"  look at what a row sees of it:\n    {python_command()} -m mvd.data.inspect {target}{place}")
    if row is not None:
        weights = f" pretrain.weights={STUDENT}" if row.needs_weights else ""
        submit = f"{python_command()} -m launch.submit {target}{weights}"
        print(f"  see the plan:\n    {submit} --dry-run\n  run it on this machine:\n    {submit} --local")


def _target(dataset: str) -> str:
    """A row of a known data set."""
    known = base_of(dataset)
    return known if known in ("ucf101", "hmdb51") else f"vitb_from_vitb_{known}"
