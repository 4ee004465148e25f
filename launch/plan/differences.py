"""In which settings a row differs from the row of experiments/ whose target it has.

A changed plan must not pass for the paper's: the differences are printed beside the target, and stored with each run.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.plan.graph import Node
from launch.plan.rows import EXPERIMENTS, load_rows
from mvd.config import ConfigError, Row
from mvd.files import write_json
from mvd.run_directory import RunDirectory

MOST = 8  # differences that are written out
IGNORED = ("name", "seed")


def changed_settings(row: Row) -> list[str]:
    """The settings of a row that differ from those of experiments/, as `finetune.optimization.epochs 75 -> 10`.

    Seeds do not count, since the paper does not give them, nor do settings that change nothing but how a stage runs.
    A row without a target claims nothing and has no differences.
    """
    defined = _defined(row)
    return [] if defined is None else list(differences(defined, row))


def describe(row: Row) -> str:
    """`2 fields differ from the paper: ...`, or nothing for a row that is as it is defined."""
    changed, defined = changed_settings(row), _defined(row)
    if not changed or defined is None or row.target is None:
        return ""
    origin = "the paper" if row.target.source == "paper" else f"the row {defined.name} of experiments/"
    count = "1 field differs" if len(changed) == 1 else f"{len(changed)} fields differ"
    more = f", and {len(changed) - MOST} more" if len(changed) > MOST else ""
    return f"{count} from {origin}: {', '.join(changed[:MOST])}{more}"


def target_text(row: Row) -> str:
    """The target as `82.7 / 95.4 (paper)`, top-1 and top-5 in percent; `-` for none."""
    if row.target is None:
        return "-"
    top5 = "-" if row.target.top5 is None else f"{row.target.top5:.1f}"
    return f"{row.target.top1:.1f} / {top5} ({row.target.source})"


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """The differing fields of two settings dataclasses of the same type, as `path before -> after`."""
    for field in dataclasses.fields(before):
        counts = field.metadata.get("hashed", True) or field.name == "weights"
        if field.name in IGNORED or not counts:
            continue
        old, new = getattr(before, field.name), getattr(after, field.name)
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            yield from differences(old, new, f"{name}.")
        elif old != new:
            yield f"{name} {_text(old)} -> {_text(new)}"


def note_rows(rows: Sequence[Row], nodes: Sequence[Node], runs: Path) -> None:
    """Writes rows.json into each stage's run directory that exists: row -> target and differences."""
    named = {
        row.name: {"target": row.target and dataclasses.asdict(row.target), "differs": describe(row)} for row in rows
    }
    for node in nodes:
        files = RunDirectory(runs / node.id)
        if files.path.is_dir():
            write_json(files.rows, noted_rows(files) | {name: named[name] for name in node.rows})


def noted_rows(files: RunDirectory) -> dict[str, dict[str, Any]]:
    """What `note_rows` wrote; {} if it is missing or damaged, since a submission writes it again."""
    try:
        noted: dict[str, dict[str, Any]] = json.loads(files.rows.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _defined(row: Row) -> Row | None:
    """The row of experiments/ with the same name, or else the most similar one of those with the same target."""
    if row.target is None:
        return None
    known = _rows_of_experiments()
    named = [other for other in known if other.name == row.name]
    alike = named or [other for other in known if other.target == row.target]
    return min(alike, key=lambda other: len(list(differences(other, row))), default=None)


@lru_cache
def _rows_of_experiments() -> tuple[Row, ...]:
    rows: list[Row] = []
    for path in sorted(EXPERIMENTS.glob("*.py")):
        try:
            rows += load_rows([str(path)], [])
        except ConfigError:
            continue  # recipes.py, and a draft that cannot be loaded: it defines no row
    return tuple(rows)


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f"({type(value).__name__.lower()})"
    return "null" if value is None else str(value)
