"""The rehearsals of a plan, as stages with a run directory of their own in runs/rehearsals (mvd.rehearsal)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.cluster import Cluster, Layout
from launch.plan.graph import Node
from launch.plan.rehearsed import rehearsal_name, rehearsals_folder
from launch.plan.resolve import build_stage, data_is_missing
from mvd.batch import solve_batch
from mvd.config import ConfigError, Test
from mvd.stage import Rehearsal, Stage

LOG_EVERY = 5  # updates


class Job(NamedTuple):
    """One job of a rehearsal."""

    node: Node
    stage: Stage
    layout: Layout


class Planned(NamedTuple):
    """A rehearsal. resumed: the job that resumes it on fewer GPUs. stands_for: the plan's stages that it measures."""

    whole: Job
    resumed: Job | None
    stands_for: list[str]


def plan_rehearsals(nodes: Sequence[Node], cluster: Cluster, local: bool) -> list[Planned]:
    """The rehearsals of a plan, one per different stage.

    Raises:
        ConfigError: an own data set is missing.
    """
    planned: dict[str, Planned] = {}
    for node in nodes:
        stage = build_stage(node, cluster)
        name = rehearsal_name(node, stage, cluster, local)
        if name in planned:
            planned[name].stands_for.append(node.id)
        else:
            planned[name] = _plan(name, node, stage, cluster)
    return list(planned.values())


def _plan(name: str, node: Node, stage: Stage, cluster: Cluster) -> Planned:
    layout = cluster.layout(node.kind, node.recipe)
    fewer = None if isinstance(stage.recipe, Test) else _fewer_gpus(node, cluster)
    random = [role for role, path in stage.inputs.items() if not Path(path).is_file()]
    how = Rehearsal(random_weights=random, generated_data=_stands_in(node, cluster), keep_checkpoint=fewer is not None)
    whole = dataclasses.replace(
        stage,
        id=name,
        inputs={role: path for role, path in stage.inputs.items() if role not in random},
        execution=dataclasses.replace(
            stage.execution,
            runs=str(rehearsals_folder(cluster)),
            shards=1,
            checkpoint_every=None,  # it saves at its end
            checkpoint_minutes=None,
            keep_every_epochs=None,
            keep_checkpoints=1,
            log_every=LOG_EVERY,
            probe_every=0,
            rehearsal=how,
        ),
    )
    job = Job(dataclasses.replace(node, id=name, parents={}, files={}), whole, layout)
    resumed = None if fewer is None else _resumed(job, fewer)
    return Planned(job, resumed, [node.id])


def _resumed(whole: Job, layout: Layout) -> Job:
    """The job that resumes a rehearsal on the GPUs of another layout."""
    batch = solve_batch(whole.stage.recipe, layout.nodes * layout.gpus, whole.stage.execution.micro_batch)
    how = whole.stage.execution.rehearsal or Rehearsal()
    execution = dataclasses.replace(
        whole.stage.execution,
        world_size=batch.world_size,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        rehearsal=dataclasses.replace(how, resume_from=str(whole.stage.directory), keep_checkpoint=False),
    )
    name = f"{whole.stage.id}-resumed"
    node = dataclasses.replace(whole.node, id=name, parents={"rehearsal": whole.stage.id})
    return Job(node, dataclasses.replace(whole.stage, id=name, execution=execution), layout)


def _fewer_gpus(node: Node, cluster: Cluster) -> Layout | None:
    """About half of the nodes, or of one node's GPUs; None for a single GPU."""
    layout = cluster.layout(node.kind, node.recipe)
    if layout.nodes * layout.gpus == 1:
        return None
    half = Layout(layout.nodes // 2, layout.gpus) if layout.nodes > 1 else Layout(1, layout.gpus // 2)
    resources: Any = {node.kind: dataclasses.replace(cluster.resources(node.kind), nodes=None)}
    smaller = dataclasses.replace(cluster, nodes=half.nodes, gpus_per_node=half.gpus, **resources)
    return smaller.layout(node.kind, node.recipe)


def _stands_in(node: Node, cluster: Cluster) -> bool:
    missing = data_is_missing(node, cluster)
    if missing and node.recipe.own_dataset is not None:
        name = node.recipe.dataset
        raise ConfigError(f"datasets.{name}.root must be the folder of your own data, which nothing can stand in for")
    return missing
