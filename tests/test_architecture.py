"""Imports run down only, the launcher plans without torch, and files and functions stay short."""

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from benchmarks.structure import (
    LONGEST_FUNCTION,
    ROOT,
    TYPED,
    functions,
    imports,
    imports_up,
    long_files,
    modules,
    unplaced,
)

COMMANDS = ("submit", "status", "report", "cancel", "logs", "prepare")


def test_every_module_belongs_to_a_room():
    assert unplaced(ROOT) == [], "give the module a row in benchmarks/structure.py, ROOMS"


def test_no_import_runs_up():
    assert imports_up(ROOT) == []


def test_no_two_modules_import_each_other_by_any_way():
    graph: dict[str, set[str]] = {module: set() for module in modules(ROOT, TYPED)}
    for edge in imports(ROOT, TYPED):
        if not edge.importer.startswith(edge.imported + "."):  # a package's __init__ may gather its own modules
            graph[edge.importer].add(edge.imported)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_evaluation_never_imports_training():
    room = [edge for edge in imports(ROOT) if edge.importer.startswith("mvd.evaluation")]
    assert room
    assert [edge for edge in room if edge.imported.startswith("mvd.train")] == []


def test_an_import_from_a_later_room_is_found(tmp_path):
    for name in ("mvd", "mvd/train", "mvd/evaluation", "mvd/new_room"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "mvd" / "evaluation" / "multiview.py").write_text("def f():\n    from mvd.train import loop\n")
    (tmp_path / "mvd" / "train" / "loop.py").write_text("import mvd.evaluation.multiview\n")
    assert imports_up(tmp_path) == [("mvd.evaluation.multiview", "mvd.train.loop")]
    assert unplaced(tmp_path) == ["mvd.new_room"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_launcher_starts_without_torch(command):
    check = f"import launch.{command}, sys; print(sorted({{'torch', 'deepspeed', 'timm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_is_made_without_torch(tmp_path):
    (tmp_path / "cluster.yaml").write_text(f"runs: {tmp_path / 'runs'}\n")
    plan = ["launch/submit.py", "experiments/demo", "--dry-run", "--cluster", str(tmp_path / "cluster.yaml")]
    script = f"import runpy, sys\nsys.argv = {plan}\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    script += "finally:\n    assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain-tiny_from_tiny" in done.stdout


def test_no_file_is_longer_than_300_lines():
    assert long_files(ROOT) == {}


def test_no_function_is_longer_than_45_lines():
    assert [function for function in functions(ROOT) if function.lines > LONGEST_FUNCTION] == []
