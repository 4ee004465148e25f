"""Figures of the code's structure: sizes, complexity, types and the direction of imports.

python -m benchmarks.structure          # this tree
python -m benchmarks.structure PATH     # another checkout, to compare with

Needs the test extra (ruff, mypy). Counts `mvd`, `launch`, `experiments` and `benchmarks`; tests are left out.
"""

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mvd", "launch", "experiments", "benchmarks")
TYPED = ("mvd", "launch", "experiments")

LONGEST_FILE = 300  # lines
LONGEST_FUNCTION = 45  # lines

# The rooms, the lowest first. A module may import from its own row and from the rows before it. The longest prefix
# decides: launch.slurm.submit has a row of its own, later than the rest of launch.slurm.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("mvd", "mvd.version", "mvd.host", "mvd.files"),
    ("mvd.config",),
    ("mvd.run_directory", "mvd.batch", "mvd.flops", "mvd.identity", "mvd.sharing"),
    ("mvd.weight_keys", "mvd.weight_shapes", "mvd.weight_check"),
    ("mvd.memory",),
    ("mvd.stage", "mvd.owner"),
    ("mvd.provenance",),
    ("mvd.distributed",),
    ("mvd.monitoring",),
    ("mvd.models", "mvd.data"),
    ("mvd.evaluation",),
    ("mvd.train",),
    ("mvd.run", "mvd.export", "mvd.predict", "mvd.probe", "mvd.rehearsal", "mvd.stand_ins"),
    ("experiments",),
    ("launch", "launch.cluster"),
    ("launch.snapshot", "launch.plan"),
    ("launch.slurm",),
    ("launch.job",),
    ("launch.slurm.sbatch",),
    ("launch.cli", "launch.stage_state", "launch.checks"),
    ("launch.reporting",),
    ("launch.report",),
    ("launch.local",),
    ("launch.slurm.submit",),
    ("launch.rehearsal", "launch.rehearsal_report"),
    (
        *("launch.submit", "launch.status", "launch.cancel", "launch.logs"),
        *("launch.prepare", "launch.inspect_data", "launch.doctor"),
    ),
)


class Import(NamedTuple):
    """`importer` imports `imported`; both are modules of the tree."""

    importer: str
    imported: str


class Function(NamedTuple):
    """A function or method, and its length with signature and docstring, without decorators."""

    where: str
    lines: int


def python_files(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Dotted name -> file."""
    names = {path: path.relative_to(root).with_suffix("").parts for path in python_files(root, packages)}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


def imports(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Import]:
    """All imports between modules of the tree, those inside functions included."""
    files = modules(root, packages)
    found = {Import(name, target) for name, path in files.items() for target in _targets(path, files)}
    return sorted(edge for edge in found if edge.importer != edge.imported)


def _targets(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in files else node.module


def level(module: str) -> int | None:
    """The row of ROOMS that a module belongs to; None if it has none."""
    rows = {prefix: number for number, row in enumerate(ROOMS) for prefix in row}
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in rows:
            is_new = prefix in ("mvd", "launch") and module != prefix
            return None if is_new else rows[prefix]
    return None


def unplaced(root: Path) -> list[str]:
    """Modules that no row of ROOMS holds: a new file or folder directly in mvd/ or launch/ needs an entry."""
    return [module for module in modules(root, TYPED) if level(module) is None]


def imports_up(root: Path) -> list[Import]:
    """Imports of a module from a later row of ROOMS; modules without a row are left out."""
    found = []
    for edge in imports(root, TYPED):
        importer, imported = level(edge.importer), level(edge.imported)
        if importer is not None and imported is not None and importer < imported:
            found.append(edge)
    return found


def mutual_imports(root: Path) -> list[tuple[str, str]]:
    """Pairs of folders that import each other; a file beside the folders counts as a folder."""
    packages = {name for name, path in modules(root, TYPED).items() if path.name == "__init__.py"}

    def folder(module: str) -> str:
        short = ".".join(module.split(".")[:2])
        return short if short in packages or "." in short else module

    pairs = {(folder(edge.importer), folder(edge.imported)) for edge in imports(root, TYPED)}
    return sorted((one, other) for one, other in pairs if one < other and (other, one) in pairs)


def functions(root: Path) -> list[Function]:
    return [
        Function(f"{path.relative_to(root)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for path in python_files(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def long_files(root: Path) -> dict[str, int]:
    """Files with more lines than LONGEST_FILE."""
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in python_files(root)}
    return {name: count for name, count in lines.items() if count > LONGEST_FILE}


def complexities(root: Path) -> list[int]:
    """Cyclomatic complexity of every function, as ruff's C901 counts it."""
    options = ["--isolated", "--select=C901", "--config=lint.mccabe.max-complexity=0", "--output-format=json"]
    folders = [name for name in PACKAGES if (root / name).is_dir()]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero", *options, *folders]
    report = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    messages = [re.search(r"\((\d+) > 0\)", finding["message"]) for finding in report]
    return [int(match[1]) for match in messages if match]


def type_errors(root: Path) -> int:
    """Errors of mypy --strict, under the tree's own [tool.mypy]."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", *TYPED]
    output = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True).stdout
    return sum(": error: " in line for line in output.splitlines())


def table(root: Path) -> list[tuple[str, str]]:
    """The figures, one line each: what is counted, and the value."""
    lengths = functions(root)
    longest = max(lengths, key=lambda function: function.lines)
    p95 = statistics.quantiles([function.lines for function in lengths], n=20)[-1]
    complexity = complexities(root)
    files = long_files(root)
    mutual = mutual_imports(root)
    return [
        ("longest function, lines", f"{longest.lines} ({longest.where})"),
        ("95th percentile of function lengths, lines", f"{p95:.0f}"),
        (f"files over {LONGEST_FILE} lines", _count(f"{name} {lines}" for name, lines in files.items())),
        ("functions over complexity 10 / 12", " / ".join(str(sum(n > top for n in complexity)) for top in (10, 12))),
        ("highest complexity", str(max(complexity))),
        ("errors of mypy --strict", str(type_errors(root))),
        ("imports that run up", _count(f"{edge.importer} -> {edge.imported}" for edge in imports_up(root))),
        ("modules without a row in ROOMS", str(len(unplaced(root)))),
        ("folders that import each other", _count(f"{one} <-> {other}" for one, other in mutual)),
    ]


def _count(found: Iterator[str]) -> str:
    names = list(found)
    return f"{len(names)} ({', '.join(names)})" if names else "0"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, help="root of a checkout (default: this one)")
    print("| | |\n|---|---|")
    for what, value in table(parser.parse_args().path.resolve()):
        print(f"| {what} | {value} |")
