"""What the launcher's commands print: tables, and the next useful commands."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.cluster import ROOT

FILE_WIDTH = 1000  # columns where the output is no terminal: one line stays one line


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table; columns whose name ends in `>` are aligned to the right."""
    from rich.console import Console  # here, since most commands that end in an error never get this far
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False).print(table)


def command(script: str, *arguments: str) -> str:
    """A command line for a script of launch/, as it can be typed where the user is."""
    path = ROOT / "launch" / script
    inside = Path.cwd().is_relative_to(ROOT)
    return shlex.join(["python", os.path.relpath(path) if inside else str(path), *arguments])


def print_next(commands: Iterable[tuple[str, str]]) -> None:
    """The next useful commands, each under what it is for."""
    print("\nnext:")
    for purpose, line in commands:
        print(f"  {purpose}:\n    {line}")


def short(path: str | Path) -> str:
    """A path as it can be typed where the user is."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
