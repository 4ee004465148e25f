"""From rows to the graph of their stages, and from there to stages that can run on a cluster."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from launch.cluster import Cluster
from mvd.batch import Batch, solve_batch
from mvd.config import DATASETS, ConfigError, ImageTeacher, Kind, Recipe, Row, Test, VideoTeacher, facts_of
from mvd.data.annotations import MANIFEST, Split, class_count, load_split
from mvd.files import sha256
from mvd.stage import WEIGHTS, DatasetPaths, Execution, Stage, identity, stage_id

# Lists that a stage of a kind reads, where they are others than the training list.
SPLITS: dict[Kind, tuple[Split, ...]] = {"finetune": ("train", "val"), "test": ("test",)}
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which they depend on each other


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


def build_stage(node: Node, cluster: Cluster) -> Stage:
    """The stage as the cluster will run it: batch solved, input and data paths filled in where they are declared."""
    resources = cluster.resources(node.kind)
    world_size = cluster.gpus(node.kind, node.recipe)
    if node.kind == "test":
        batch = Batch(resources.micro_batch or 1, 1, world_size)
    else:
        batch = _solve(node, world_size, resources.micro_batch)
    inputs = {role: str(Path(cluster.runs) / parent / WEIGHTS) for role, parent in node.parents.items()}
    for role, name in node.teacher_files.items():
        inputs[role] = cluster.teachers.get(name, "")
    inputs |= node.files
    digests = {role: node.parents[role].removeprefix("weights:") for role in node.files}
    execution = Execution(
        world_size=world_size,
        shards=cluster.test_shards if node.kind == "test" else 1,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        deepspeed=resources.deepspeed,
        precision=cluster.precision or "bf16",
        runs=cluster.runs,
        data=cluster.datasets.get(node.recipe.dataset),
        reader=cluster.reader,
        workers=cluster.workers,
        checkpoint_every=cluster.checkpoint_every,
        checkpoint_minutes=cluster.checkpoint_minutes,
        keep_checkpoints=cluster.keep_checkpoints,
        keep_every_epochs=cluster.keep_every_epochs,
        faults=cluster.faults,
        validate_every=cluster.validate_every,
        log_every=cluster.log_every,
    )
    return Stage(kind=node.kind, id=node.id, recipe=node.recipe, inputs=inputs, digests=digests, execution=execution)


def undeclared(nodes: Sequence[Node], cluster: Cluster) -> list[str]:
    """The cluster profile's fields that these stages need and that nobody has set, as `field: what it is`.

    Raises:
        ConfigError: a field that is set names a file or folder that does not exist.
    """
    needed: dict[str, None] = {}
    for node in nodes:
        dataset = node.recipe.dataset
        if dataset not in cluster.datasets:
            needed[_undeclared_data(node.recipe, cluster)] = None
        else:
            _check_data(node, cluster)
        for role, name in node.teacher_files.items():
            if name not in cluster.teachers:
                needed[f"teachers.{name}: checkpoint of the {role.replace('_', ' ')} (or teachers=train)"] = None
            elif not Path(cluster.teachers[name]).is_file():
                path = cluster.teachers[name]
                raise ConfigError(
                    f"teachers.{name}: there is no file {path}; put the {role.replace('_', ' ')}'s checkpoint there, "
                    "mend the path in the cluster profile, or run with teachers=train"
                )
    return list(needed)


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


def _solve(node: Node, world_size: int, micro_batch: int | None) -> Batch:
    try:
        return solve_batch(node.recipe, world_size, micro_batch)
    except ConfigError as error:
        raise ConfigError(f"{node.id}: {error}") from error


def _check_data(node: Node, cluster: Cluster) -> None:
    dataset = node.recipe.dataset
    paths = cluster.datasets[dataset]
    if is_generated(dataset):
        return
    root = Path(paths.root)
    splits = SPLITS.get(node.kind, ("train",))
    if facts_of(node.recipe).media == "image":
        needed = [root, root / "train"]
    else:
        needed = [root, *(root / getattr(paths, split) for split in splits)]
    for path in needed:
        if not path.exists():
            raise ConfigError(f"datasets.{dataset}: {path} does not exist; mend the path in the cluster profile")
    if node.recipe.own_dataset is not None:
        _check_declaration(node, paths, splits)


def _check_declaration(node: Node, paths: DatasetPaths, splits: Iterable[Split]) -> None:
    """Compares what a row declares of its own data with its lists, and with the manifest of mvd.data.prepare."""
    recipe, facts = node.recipe, facts_of(node.recipe)
    manifest = Path(paths.root) / MANIFEST
    if manifest.is_file():
        found = _prepared_classes(manifest)
        if found != facts.classes:
            raise ConfigError(
                f"{manifest} names {found} classes, but the row declares classes={facts.classes} for {recipe.dataset}; "
                f"set it to {found} if this is the right data set"
            )
    for split in splits:
        load_split(recipe, paths, split)
    if not isinstance(recipe, Test) and facts.train_samples < recipe.optimization.global_batch:
        raise ConfigError(
            f"{recipe.dataset} has {facts.train_samples} training samples, fewer than one global batch; "
            f"set {node.kind}.optimization.global_batch to at most that, or use more data"
        )


def _prepared_classes(manifest: Path) -> int:
    try:
        return class_count(json.loads(manifest.read_text(encoding="utf-8"))["classes"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{manifest} is none of mvd.data.prepare's; prepare the data again, or move it away"
        ) from error


def _undeclared_data(recipe: Recipe, cluster: Cluster) -> str:
    others = [name for name in cluster.datasets if name not in DATASETS]
    known = f"; the profile names {', '.join(others)}" if others else ""
    return f"datasets.{recipe.dataset}.root: folder of the {recipe.dataset} {facts_of(recipe).media}s{known}"


def is_generated(dataset: str) -> bool:
    """Whether a data set is made by this project (mvd.data.motion) the first time it is needed."""
    return dataset == "motion"
