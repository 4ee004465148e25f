"""Output of the launcher's commands: tables, and the commands to run next."""

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.cluster import CODE, ROOT
from mvd.config import ConfigError
from mvd.host import python_command

FILE_WIDTH = 1000  # columns if the output is not a terminal, so that no line is wrapped


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a plain table; a column whose name ends in `>` is right-aligned."""
    from rich.console import Console  # imported late: start-up stays fast if a command ends in an error
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False).print(table)


def command(script: str, *arguments: str) -> str:
    """A command line for a script of launch/, as it can be typed in the current folder."""
    if CODE != ROOT:  # installed from a wheel
        return shlex.join([python_command(), "-m", f"launch.{script.removesuffix('.py')}", *arguments])
    path = ROOT / "launch" / script
    inside = Path.cwd().is_relative_to(ROOT)
    return shlex.join([python_command(), os.path.relpath(path) if inside else str(path), *arguments])


def tensorboard(runs: str | Path) -> str:
    """The command that shows the curves of a runs folder."""
    return shlex.join([python_command(), "-m", "tensorboard.main", "--logdir", short(runs)])


def print_next(commands: Iterable[tuple[str, str]]) -> None:
    """Print commands to run next, given as (purpose, command line)."""
    print("\nnext:")
    for purpose, line in commands:
        print(f"  {purpose}:\n    {line}")


def counted(number: int, noun: str) -> str:
    """For instance `1 stage`, `3 stages`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short(path: str | Path) -> str:
    """A path relative to the current folder if it is inside it, else absolute."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def sentence_of(error: ConfigError | OSError) -> str:
    """What is wrong, where: an error's own sentence, or that of the operating system."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return str(error)
