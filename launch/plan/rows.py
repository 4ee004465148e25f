"""Finds and loads row files, and applies `key=value` settings to their rows."""

import ast
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from launch.cluster import CODE
from mvd.config import ConfigError, Row
from mvd.config.typed import Override, apply_overrides, check_keys, check_types, nearest

EXPERIMENTS = CODE / "experiments"
SECTIONS = ("image_teacher", "video_teacher", "pretrain", "finetune", "test", "target")


def load_rows(targets: Sequence[str], overrides: Sequence[Override]) -> list[Row]:
    """The rows of all targets without duplicates; an override applies to every row that has its section.

    Raises:
        ConfigError: an unknown target, a file that declares no row, or an override that no row has a section for.
    """
    rows: dict[str, Row] = {}
    for target in targets:
        for row in _rows_of(find(target)):
            if rows.setdefault(row.name, row) != row:
                raise ConfigError(f"{target} declares another row called {row.name}; rename one of them")
    for override in overrides:
        check_keys(Row, override)
        missing = [_missing_section(row, override) for row in rows.values()]
        if all(missing):
            first = next(iter(rows.values()))
            present = ", ".join(name for name in SECTIONS if getattr(first, name) is not None)
            raise ConfigError(f"{override.text}: {first.name} has no {missing[0]}; it has {present}")
    return [_with_overrides(row, overrides) for row in rows.values()]


def find(target: str) -> Path:
    """The row file of a target: a path relative to the current folder or to the project, or a name in experiments/.

    Raises:
        ConfigError: there is no such file; lists the nearest rows.
    """
    file = Path(target if target.endswith(".py") else f"{target}.py").expanduser()
    for folder in (Path.cwd(), CODE, EXPERIMENTS, EXPERIMENTS / "teachers"):
        if (folder / file).is_file():
            return (folder / file).resolve()
    if target.partition(".")[0] in (*SECTIONS, "cluster"):
        raise ConfigError(f"there is no row or suite {target!r}; if it is a setting, write {target}=VALUE")
    known = sorted(p.stem for p in EXPERIMENTS.rglob("*.py") if p.stem not in ("__init__", "recipes"))
    raise ConfigError(f"there is no row or suite {target!r}{nearest(file.stem, known)}; see {EXPERIMENTS} for all")


def _rows_of(path: Path) -> list[Row]:
    try:
        module = _import(path)
        rows = _declared(module, path)
        for row in rows:
            check_types(row)
    except ConfigError as error:
        raise ConfigError(f"{path}{_line(error, path)}: {error}") from error
    except Exception as error:  # row files run any Python
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}{_line(error, path)}: {type(error).__name__}: {reason}; fix the row file") from error
    return rows


def _declared(module: ModuleType, path: Path) -> list[Row]:
    """The rows that a row file assigns itself: a name that it only imports from another row file is not its own."""
    assigned = _assigned(path)
    if {"row", "rows"} <= assigned:
        raise ConfigError("it declares both `row` and `rows`, and only one of them can count; remove one")
    (name,) = assigned or {"rows" if hasattr(module, "rows") else "row"}
    value = getattr(module, name, None)
    if isinstance(value, Row):
        return [value]
    rows = list(value) if isinstance(value, (list, tuple)) else []
    if not rows or not all(isinstance(row, Row) for row in rows):
        raise ConfigError("it declares no row; give it `row = Row(...)`, or `rows = (Row(...), Row(...))` for several")
    return rows


def _assigned(path: Path) -> set[str]:
    """Which of `row` and `rows` the file assigns at its top level."""
    targets: list[ast.expr] = []
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
            targets.append(statement.target)
    return {target.id for target in targets if isinstance(target, ast.Name)} & {"row", "rows"}


def _import(path: Path) -> ModuleType:
    if path.is_relative_to(EXPERIMENTS):
        return importlib.import_module(".".join(path.relative_to(CODE).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(f"row_file_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ConfigError("not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _line(error: Exception, path: Path) -> str:
    """`, line 7` if the error was raised in the row file or below it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    return f", line {lines[-1]}" if lines else ""


def _missing_section(row: Row, override: Override) -> str | None:
    """The first section of the override's path that the row does not have."""
    path = override.path if isinstance(override.value, Mapping) else override.path[:-1]
    value: Any = row
    for key in path:
        value = getattr(value, key)
        if value is None:
            return key
    return None


def _with_overrides(row: Row, overrides: Sequence[Override]) -> Row:
    applicable = [override for override in overrides if _missing_section(row, override) is None]
    return apply_overrides(row, applicable) if applicable else row
