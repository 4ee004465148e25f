"""What rehearsals (launch/rehearsal.py) have measured, by what it depends on: the work of an update and its layout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.cluster import Cluster
from launch.plan.graph import Node
from launch.plan.resolve import data_is_missing
from mvd.config import SIZES, Pretrain, Recipe, Test, dataset_of
from mvd.flops import gpu_hours
from mvd.host import gpu_name
from mvd.identity import stage_id
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

FOLDER = "rehearsals"  # in the runs folder
# Fields of a stage's execution on which its speed depends.
LAYOUT = [
    *("world_size", "micro_batch", "accumulation", "batch_parts", "deepspeed", "precision", "compile"),
    *("reader", "workers"),
]


class Cost(NamedTuple):
    """GPU-hours of a stage. measured: what its rehearsal found; None if the GPU-hours are estimated."""

    gpu_hours: float
    measured: dict[str, Any] | None


def rehearsals_folder(cluster: Cluster) -> Path:
    """The folder of all rehearsals' run directories."""
    return Path(cluster.runs) / FOLDER


def rehearsal_name(node: Node, stage: Stage, cluster: Cluster, local: bool) -> str:
    """The name of a stage's rehearsal, `<kind>-<size>-<8 hex>`; equal for stages that do the same work per update.

    The digest covers the recipe without its schedule and seed; the layout, with micro-batch, ZeRO, precision, reader
    and loader processes; the kind of GPU (its name with --local, else what jobs ask for);
    and whether generated samples stand in for the data.
    """
    recipe, how = _without_schedule(node.recipe), stage.execution
    size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size].short_name
    slurm = cluster.slurm
    layout = {name: str(getattr(how, name)) for name in LAYOUT}
    layout["nodes"] = str(cluster.layout(node.kind, node.recipe))
    layout["checkpointing"] = str(getattr(stage.recipe, "activation_checkpointing", False))
    asked = (slurm.partition, slurm.constraint, slurm.cpus_per_gpu, slurm.options.get("gres"))
    layout["machine"] = (gpu_name() or "cpu") if local else str(asked)
    layout["generated"] = str(data_is_missing(node, cluster))
    return stage_id(node.kind, size, recipe, layout)


def figures_of(name: str, cluster: Cluster) -> dict[str, Any] | None:
    """What a rehearsal measured (mvd.rehearsal.rehearse); None if there is none, or it is not complete.

    Raises:
        ConfigError: its result is damaged.
    """
    result = RunDirectory(rehearsals_folder(cluster) / name).read_result()
    found: dict[str, Any] | None = (result or {}).get("rehearsal")
    return found


def costs(nodes: Sequence[Node], stages: Sequence[Stage], cluster: Cluster, local: bool) -> list[Cost]:
    """The GPU-hours of each stage, at the rate that its rehearsal measured, or else at sustained_tflops."""
    found = []
    for node, stage in zip(nodes, stages, strict=True):
        measured = figures_of(rehearsal_name(node, stage, cluster, local), cluster)
        if measured and "samples_per_second" in measured:
            seconds = _samples(node.recipe) / measured["samples_per_second"]
            found.append(Cost(seconds * measured["gpus"] / 3600, measured))
        else:
            found.append(Cost(gpu_hours(node.recipe, cluster.sustained_tflops), None))
    return found


def _samples(recipe: Recipe) -> int:
    """Samples of a whole stage: training leaves out the incomplete last batch of each epoch."""
    if isinstance(recipe, Test):
        return dataset_of(recipe).val_samples
    settings = recipe.optimization
    return dataset_of(recipe).train_samples // settings.global_batch * settings.global_batch * settings.epochs


def _without_schedule(recipe: Recipe) -> Recipe:
    if isinstance(recipe, Test):
        return recipe
    settings = dataclasses.replace(
        recipe.optimization, epochs=1, schedule_epochs=None, warmup_epochs=0, base_lr=1.0, min_lr=0.0
    )
    return dataclasses.replace(recipe, optimization=settings, seed=0)
