"""The graph of the stages of some rows."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mvd.config import KINDS, ConfigError, ImageTeacher, Kind, Recipe, Row, VideoTeacher
from mvd.files import sha256
from mvd.identity import identity, stage_id


@dataclass(frozen=True, kw_only=True)
class Node:
    """A stage of the plan, independent of the cluster.

    parents: role -> id of the stage whose weights it starts from, `checkpoint:<name>` for a teacher's checkpoint, or
        `weights:<sha256>` for a weights file that replaces a stage.
    rows: names of the rows that need it.
    files: role -> path of the weights file that replaces a stage.
    """

    kind: Kind
    id: str
    recipe: Recipe
    parents: dict[str, str]
    rows: tuple[str, ...]
    files: dict[str, str]

    @property
    def stage_parents(self) -> list[str]:
        """Ids of the stages it starts from."""
        return [parent for parent in self.parents.values() if ":" not in parent]

    @property
    def teacher_files(self) -> dict[str, str]:
        """Role -> name of the teacher checkpoint, a key of `teachers` in the cluster profile."""
        files = {role: parent.partition(":") for role, parent in self.parents.items()}
        return {role: name for role, (word, _, name) in files.items() if word == "checkpoint"}


def build_graph(rows: Iterable[Row], until: Kind = "test") -> list[Node]:
    """The stages of all rows up to the kind `until`, without duplicates, parents before children.

    Raises:
        ConfigError: a weights file does not exist, or is given for different stages.
    """
    rows = list(rows)
    _check_given_once(rows)
    nodes: dict[str, Node] = {}
    for row in rows:
        for node in _row_nodes(row):
            known = nodes.get(node.id)
            nodes[node.id] = node if known is None else dataclasses.replace(known, rows=known.rows + node.rows)
    wanted = KINDS[: KINDS.index(until) + 1]
    return sorted((n for n in nodes.values() if n.kind in wanted), key=lambda n: KINDS.index(n.kind))


def _row_nodes(row: Row) -> list[Node]:
    """The stages of one row, parents first; teachers only if the row pre-trains or has nothing but teachers.

    If several weights files are given, only the latest stage's is used; earlier stages are skipped.
    """
    nodes: list[Node] = []
    files = _given_files(row)

    def add(kind: Kind, recipe: Recipe, name: str, parents: dict[str, str]) -> str:
        made = stage_id(kind, name, recipe, parents)
        used = {role: path for role, path in files.items() if role in parents}
        nodes.append(Node(kind=kind, id=made, recipe=recipe, parents=parents, rows=(row.name,), files=used))
        return made

    teachers: dict[str, str] = {}
    wanted: list[tuple[Kind, ImageTeacher | VideoTeacher | None]] = []
    if not files and (row.pretrain is not None or row.finetune is None):
        wanted = [("image_teacher", row.image_teacher), ("video_teacher", row.video_teacher)]
    for kind, teacher in wanted:
        if teacher is not None and row.teachers == "train":
            teachers[kind] = add(kind, teacher, teacher.name, {})
        elif teacher is not None:
            teachers[kind] = f"checkpoint:{teacher.name}"
    weights = {role: f"weights:{_content(path)}" for role, path in files.items()}
    if row.pretrain is not None and not files:
        weights = {"pretrain": add("pretrain", row.pretrain, row.pretrain.name, teachers)}
    if row.finetune is not None and "finetune" not in files:
        weights = {"finetune": add("finetune", row.finetune, row.name, weights)}
    if row.test is not None:
        add("test", row.test, row.name, weights)
    return nodes


def _given_files(row: Row) -> dict[str, str]:
    """Role -> absolute path of the latest stage's weights file, if the row has one; a dict of one entry at most."""
    for role in ("finetune", "pretrain"):
        recipe = getattr(row, role)
        if recipe is not None and recipe.weights is not None:
            path = Path(recipe.weights).expanduser().absolute()
            if not path.is_file():
                raise ConfigError(f"{role}.weights: there is no file {path}; correct the path")
            return {role: str(path)}
    return {}


def _content(path: str) -> str:
    """SHA-256 of a file, cached until its size or modification time changes."""
    stat = Path(path).stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _digest(path: str, size: int, changed: int) -> str:
    return sha256(Path(path))


def _check_given_once(rows: Sequence[Row]) -> None:
    """Rejects one weights file given for several different stages, such as a suite of rows."""
    instead: dict[tuple[str, str], Any] = {}
    for row in rows:
        for role, path in _given_files(row).items():
            stage = identity({"pretrain": row.pretrain, role: getattr(row, role)})
            if instead.setdefault((role, path), stage) != stage:
                raise ConfigError(
                    f"{role}.weights: {path} cannot replace different {role} stages; submit these rows separately"
                )
