"""Turns the nodes of a plan into stages for a cluster, and lists what the profile does not set yet."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.cluster import Cluster
from launch.plan.fit import fit
from launch.plan.graph import Node
from launch.plan.weights import check_given_weights
from mvd.config import DATASETS, ConfigError, DatasetPaths, Kind, Recipe, RunSettings, dataset_of
from mvd.data.annotations import MANIFEST, Split, class_count, load_split
from mvd.run_directory import RunDirectory
from mvd.stage import Execution, Stage

# Annotation lists that a stage of a kind reads; the others read the training list.
SPLITS: dict[Kind, tuple[Split, ...]] = {"finetune": ("train", "val"), "test": ("test",)}


def build_stage(node: Node, cluster: Cluster) -> Stage:
    """The stage as the cluster will run it, with its batch split over the GPUs and its paths as far as they are set."""
    world_size = cluster.gpus(node.kind, node.recipe)
    fitted = fit(node, cluster, world_size)
    inputs = {role: str(RunDirectory(Path(cluster.runs) / parent).weights) for role, parent in node.parents.items()}
    for role, name in node.teacher_files.items():
        inputs[role] = cluster.teachers.get(name, "")
    inputs |= node.files
    digests = {role: node.parents[role].removeprefix("weights:") for role in node.files}
    run_settings = {setting.name: getattr(cluster, setting.name) for setting in dataclasses.fields(RunSettings)}
    execution = Execution(
        world_size=world_size,
        shards=cluster.test_shards if node.kind == "test" else 1,
        micro_batch=fitted.batch.micro_batch,
        accumulation=fitted.batch.accumulation,
        deepspeed=fitted.deepspeed,
        precision=cluster.precision or "bf16",
        runs=cluster.runs,
        data=cluster.datasets.get(node.recipe.dataset),
        **run_settings,
    )
    return Stage(kind=node.kind, id=node.id, recipe=fitted.recipe, inputs=inputs, digests=digests, execution=execution)


def missing_settings(nodes: Sequence[Node], cluster: Cluster) -> list[str]:
    """Fields of the cluster profile that these stages need but that are not set, as `field: what it is`.

    So are fields that name a file or folder that does not exist, as in a profile that was copied from the example.

    Raises:
        ConfigError: the data contradicts the row, or weights do not fit.
    """
    needed: dict[str, None] = {}
    for node in nodes:
        dataset = node.recipe.dataset
        if dataset not in cluster.datasets:
            needed[_undeclared_data(node.recipe, cluster)] = None
        elif (missing := _first_missing(node, cluster.datasets[dataset])) is not None:
            needed[f"datasets.{dataset}.root: {missing} does not exist; correct the path"] = None
        elif node.recipe.own_dataset is not None:
            _check_declaration(node, cluster.datasets[dataset], SPLITS.get(node.kind, ("train",)))
        for role, name in node.teacher_files.items():
            if name not in cluster.teachers:
                needed[f"teachers.{name}: checkpoint of the {role.replace('_', ' ')} (or teachers=train)"] = None
            elif not Path(path := cluster.teachers[name]).is_file():
                needed[f"teachers.{name}: there is no file {path}; correct the path (or teachers=train)"] = None
    check_given_weights(nodes, cluster)
    return list(needed)


def data_is_missing(node: Node, cluster: Cluster) -> bool:
    """Whether the profile does not name the stage's data set, or its folder or a list of it does not exist."""
    paths = cluster.datasets.get(node.recipe.dataset)
    return paths is None or _first_missing(node, paths) is not None


def _first_missing(node: Node, paths: DatasetPaths) -> Path | None:
    """The first folder or list of the stage's data set that does not exist; a generated one is written when needed."""
    facts = dataset_of(node.recipe)
    if facts.generated:
        return None
    root = Path(paths.root)
    if facts.media == "image":
        needed = [root, root / "train"]
    else:
        needed = [root, *(root / getattr(paths, split) for split in SPLITS.get(node.kind, ("train",)))]
    return next((path for path in needed if not path.exists()), None)


def _check_declaration(node: Node, paths: DatasetPaths, splits: Iterable[Split]) -> None:
    """Checks the row's own_dataset against its lists and the manifest of mvd.data.prepare."""
    recipe, facts = node.recipe, dataset_of(node.recipe)
    manifest = Path(paths.root) / MANIFEST
    if manifest.is_file():
        found = _prepared_classes(manifest)
        if found != facts.classes:
            raise ConfigError(
                f"{manifest} has {found} classes, but the row declares classes={facts.classes} for {recipe.dataset}; "
                f"set it to {found} if this is the right data set"
            )
    for split in splits:
        load_split(recipe, paths, split)


def _prepared_classes(manifest: Path) -> int:
    try:
        return class_count(json.loads(manifest.read_text(encoding="utf-8"))["classes"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{manifest} was not written by mvd.data.prepare; prepare the data again, or move the file away"
        ) from error


def _undeclared_data(recipe: Recipe, cluster: Cluster) -> str:
    others = [name for name in cluster.datasets if name not in DATASETS]
    known = f"; the profile has {', '.join(others)}" if others else ""
    return f"datasets.{recipe.dataset}.root: folder of the {recipe.dataset} {dataset_of(recipe).media}s{known}"
