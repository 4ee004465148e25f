"""Imports run down only, and files and functions stay short."""

from graphlib import TopologicalSorter

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


def test_no_file_is_longer_than_300_lines():
    assert long_files(ROOT) == {}


def test_no_function_is_longer_than_45_lines():
    assert [function for function in functions(ROOT) if function.lines > LONGEST_FUNCTION] == []
