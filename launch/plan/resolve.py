"""Turns the nodes of a plan into stages for a cluster, and lists what the profile does not set yet."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

from launch.cluster import Cluster
from launch.plan.graph import Node
from launch.plan.weights import check_given_weights
from mvd.batch import Batch, solve_batch
from mvd.config import (
    DATASETS,
    SIZES,
    ConfigError,
    DatasetPaths,
    Kind,
    Pretrain,
    Recipe,
    RunSettings,
    Test,
    TrainRecipe,
    dataset_of,
)
from mvd.data.annotations import MANIFEST, Split, class_count, load_split
from mvd.run_directory import RunDirectory
from mvd.stage import Execution, Stage
from mvd.weight_check import network_shapes

# Parameters of an encoder; with AdamW, each has 16 bytes of weight, gradient and optimizer state.
LARGEST_REPLICATED = 200_000_000

# Annotation lists that a stage of a kind reads; the others read the training list.
SPLITS: dict[Kind, tuple[Split, ...]] = {"finetune": ("train", "val"), "test": ("test",)}


def build_stage(node: Node, cluster: Cluster) -> Stage:
    """The stage as the cluster will run it, with its batch split over the GPUs and its paths as far as they are set."""
    resources = cluster.resources(node.kind)
    world_size = cluster.gpus(node.kind, node.recipe)
    if isinstance(node.recipe, Test):
        batch = Batch(resources.micro_batch or 1, 1, world_size)
    else:
        batch = _solve(node, node.recipe, world_size, resources.micro_batch)
    inputs = {role: str(RunDirectory(Path(cluster.runs) / parent).weights) for role, parent in node.parents.items()}
    for role, name in node.teacher_files.items():
        inputs[role] = cluster.teachers.get(name, "")
    inputs |= node.files
    digests = {role: node.parents[role].removeprefix("weights:") for role in node.files}
    run_settings = {setting.name: getattr(cluster, setting.name) for setting in dataclasses.fields(RunSettings)}
    execution = Execution(
        world_size=world_size,
        shards=cluster.test_shards if node.kind == "test" else 1,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        deepspeed=resources.deepspeed or default_deepspeed(node.recipe),
        precision=cluster.precision or "bf16",
        runs=cluster.runs,
        data=cluster.datasets.get(node.recipe.dataset),
        **run_settings,
    )
    return Stage(kind=node.kind, id=node.id, recipe=node.recipe, inputs=inputs, digests=digests, execution=execution)


def default_deepspeed(recipe: Recipe) -> str:
    """zero0 if every GPU can easily hold the whole optimizer state, else zero1, which divides it among the GPUs.

    An update under zero0 has about a third fewer operations: one collective per bucket, one norm and one optimizer
    call, instead of one or more per parameter or group of parameters.
    """
    size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
    parameters = sum(map(prod, network_shapes("finetune", size).values()))
    return "zero0" if parameters <= LARGEST_REPLICATED else "zero1"


def missing_settings(nodes: Sequence[Node], cluster: Cluster) -> list[str]:
    """Fields of the cluster profile that these stages need but that are not set, as `field: what it is`.

    Raises:
        ConfigError: a field is set to a file or folder that does not exist, the data contradicts the row, or weights do
            not fit.
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
                    f"teachers.{name}: there is no file {path}; correct the path in the cluster profile, or run with "
                    "teachers=train"
                )
    check_given_weights(nodes, cluster)
    return list(needed)


def _solve(node: Node, recipe: TrainRecipe, world_size: int, micro_batch: int | None) -> Batch:
    samples, batch = dataset_of(recipe).train_samples, recipe.optimization.global_batch
    if samples < batch:
        raise ConfigError(
            f"{recipe.dataset} has {samples} training samples, fewer than one global batch of {batch}; set "
            f"{node.kind}.optimization.global_batch to at most {samples}"
        )
    try:
        return solve_batch(recipe, world_size, micro_batch)
    except ConfigError as error:
        raise ConfigError(f"{node.id}: {error}") from error


def _check_data(node: Node, cluster: Cluster) -> None:
    """Checks that the data set's folder and lists exist, and that they match the row's own_dataset."""
    dataset = node.recipe.dataset
    paths = cluster.datasets[dataset]
    if dataset_of(node.recipe).generated:
        return
    root = Path(paths.root)
    splits = SPLITS.get(node.kind, ("train",))
    if dataset_of(node.recipe).media == "image":
        needed = [root, root / "train"]
    else:
        needed = [root, *(root / getattr(paths, split) for split in splits)]
    for path in needed:
        if not path.exists():
            raise ConfigError(f"datasets.{dataset}: {path} does not exist; correct the path in the cluster profile")
    if node.recipe.own_dataset is not None:
        _check_declaration(node, paths, splits)


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
