"""docs/fidelity.md covers all quirks, and the code and tests it refers to exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "docs" / "fidelity.md").read_text().splitlines() if re.match(r"\| *\d", line)]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]


def defined(path: Path) -> set[str]:
    """Names of the functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_every_quirk_has_its_line():
    assert [int(row[0]) for row in ROWS] == list(range(1, 36))
    assert all(len(row) == 6 and all(row) for row in ROWS)
    assert {row[2] for row in ROWS} == {"copied", "fixed", "partly fixed"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_code_and_the_tests_of_a_line_exist(row):
    for cell, folders, prefix in ((row[3], ("mvd", "experiments"), ""), (row[4], ("tests",), "test_")):
        references = re.findall(r"`([^`:]+):([^`]+)`", cell)
        assert references and len(references) == cell.count("`") // 2
        for file, name in references:
            assert file.split("/")[0] in folders and name.startswith(prefix)
            assert name in defined(ROOT / file), f"{file} has no {name}"
