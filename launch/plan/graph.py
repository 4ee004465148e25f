"""From rows to the graph of their stages, and from there to stages that can run on a cluster."""

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
    """A stage by what decides its result: no cluster, no paths.

    parents: role -> id of the stage whose weights it starts from, or `checkpoint:<name>` for a teacher's file, or
        `weights:<sha256>` for a file that is given instead of a stage.
    rows: names of the rows that need it.
    files: role -> path of the file that is given instead of a stage.
    """

    kind: Kind
    id: str
    recipe: Recipe
    parents: dict[str, str]
    rows: tuple[str, ...]
    files: dict[str, str]

    @property
    def stage_parents(self) -> list[str]:
        return [parent for parent in self.parents.values() if ":" not in parent]

    @property
    def teacher_files(self) -> dict[str, str]:
        """Role -> name of the teacher checkpoint that the cluster profile is to name."""
        files = {role: parent.partition(":") for role, parent in self.parents.items()}
        return {role: name for role, (word, _, name) in files.items() if word == "checkpoint"}


def build_graph(rows: Iterable[Row], until: Kind = "test") -> list[Node]:
    """The stages of all rows up to a kind, shared ones once, parents before children.

    Raises:
        ConfigError: weights that are given do not exist, or are given instead of two different stages.
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
    """One row's stages; a teacher is trained for the pretrain that needs it, or as a row of its own.

    Of the weights that are given, the latest count: nothing before them is run.
    """
    nodes: list[Node] = []
    files = _given_files(row)

    def add(kind: Kind, recipe: Recipe, name: str, parents: dict[str, str]) -> str:
        identity = stage_id(kind, name, recipe, parents)
        used = {role: path for role, path in files.items() if role in parents}
        nodes.append(Node(kind=kind, id=identity, recipe=recipe, parents=parents, rows=(row.name,), files=used))
        return identity

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
    """Role -> absolute path of the latest weights that the row is given instead of a stage, if any."""
    for role in ("finetune", "pretrain"):
        recipe = getattr(row, role)
        if recipe is not None and recipe.weights is not None:
            path = Path(recipe.weights).expanduser().absolute()
            if not path.is_file():
                raise ConfigError(f"{role}.weights: there is no file {path}; put the weights there, or mend the path")
            return {role: str(path)}
    return {}


def _content(path: str) -> str:
    """sha256 of a file, which is read again only after it has changed."""
    stat = Path(path).stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _digest(path: str, size: int, changed: int) -> str:
    return sha256(Path(path))


def _check_given_once(rows: Sequence[Row]) -> None:
    """Refuses one file instead of different stages, such as one student's weights for a suite of rows."""
    instead: dict[tuple[str, str], Any] = {}
    for row in rows:
        for role, path in _given_files(row).items():
            stage = identity({"pretrain": row.pretrain, role: getattr(row, role)})
            if instead.setdefault((role, path), stage) != stage:
                raise ConfigError(f"{role}.weights: {path} cannot be the {role} of all these rows; submit them apart")
