"""From what the user names to rows: finds row files, loads them and applies `key=value` settings."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from launch.cluster import ROOT
from mvd.config import ConfigError, Row
from mvd.config.typed import Override, apply_overrides, check_keys, nearest

EXPERIMENTS = ROOT / "experiments"
SECTIONS = ("image_teacher", "video_teacher", "pretrain", "finetune", "test", "target")


def load_rows(targets: Sequence[str], overrides: Sequence[Override]) -> list[Row]:
    """The rows of all targets, each once, with the overrides applied to every row that has the section.

    Raises:
        ConfigError: an unknown target, a file that declares no row, or an override that fits no row.
    """
    rows: dict[str, Row] = {}
    for target in targets:
        for row in _rows_of(find(target)):
            if rows.setdefault(row.name, row) != row:
                raise ConfigError(f"{target} declares another row called {row.name}; give one of them another name")
    for override in overrides:
        check_keys(Row, override)
        missing = [_missing_section(row, override) for row in rows.values()]
        if all(missing):
            first = next(iter(rows.values()))
            present = ", ".join(name for name in SECTIONS if getattr(first, name) is not None)
            raise ConfigError(f"{override.text}: {first.name} has no {missing[0]}; it has {present}")
    return [_with_overrides(row, overrides) for row in rows.values()]


def find(target: str) -> Path:
    """The row file that a target means: a path from here or from the project root, or a name in experiments/.

    Raises:
        ConfigError: there is no such file; names the nearest rows.
    """
    named = Path(target if target.endswith(".py") else f"{target}.py").expanduser()
    for folder in (Path.cwd(), ROOT, EXPERIMENTS, EXPERIMENTS / "teachers"):
        if (folder / named).is_file():
            return (folder / named).resolve()
    known = sorted(p.stem for p in EXPERIMENTS.rglob("*.py") if p.stem not in ("__init__", "recipes"))
    raise ConfigError(f"there is no row or suite {target!r}{nearest(named.stem, known)}; see experiments/ for all")


def _rows_of(path: Path) -> list[Row]:
    try:
        module = _import(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever a user's own row file does wrong
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from error
    declared = getattr(module, "rows", None) or (getattr(module, "row", None),)
    rows = [row for row in declared if isinstance(row, Row)]
    if len(rows) != len(declared) or not rows:
        raise ConfigError(f"{path} declares no row; give it `row = Row(...)`, or `rows = (...)` for several")
    return rows


def _import(path: Path) -> ModuleType:
    if path.is_relative_to(EXPERIMENTS):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(f"row_file_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ConfigError("is not a Python file; end its name in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _missing_section(row: Row, override: Override) -> str | None:
    """The first section on the override's way that the row does not have."""
    way = override.path if isinstance(override.value, Mapping) else override.path[:-1]
    value = row
    for key in way:
        value = getattr(value, key)
        if value is None:
            return key
    return None


def _with_overrides(row: Row, overrides: Sequence[Override]) -> Row:
    fitting = [override for override in overrides if _missing_section(row, override) is None]
    return apply_overrides(row, fitting) if fitting else row
