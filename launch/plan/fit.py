"""Fits a stage to its GPUs: micro-batch, ZeRO configuration and activation checkpointing, none of which is hashed."""

import dataclasses
from math import prod
from typing import NamedTuple

from launch.cluster import Cluster, Resources
from launch.plan.graph import Node
from mvd.batch import Batch, smallest_micro_batch, solve_batch
from mvd.config import SIZES, ConfigError, ImageTeacher, Precision, Pretrain, Recipe, Test, TrainRecipe, dataset_of
from mvd.memory import GB, USABLE, memory_of
from mvd.weight_check import network_shapes

# Parameters of an encoder; with AdamW, each has 16 bytes of weight, gradient and optimizer state.
LARGEST_REPLICATED = 200_000_000
REPLICATED_SHARE = 0.03  # of a GPU's memory that zero0 may take more than zero1


class Fitted(NamedTuple):
    """How a stage is executed. recipe: the node's, with the activation checkpointing that it needs."""

    batch: Batch
    deepspeed: str
    recipe: Recipe


def fit(node: Node, cluster: Cluster, world_size: int) -> Fitted:
    """Micro-batch, ZeRO configuration and activation checkpointing of a stage on so many GPUs.

    With gpu_memory_gb in the profile, the micro-batch is the largest that fits, and the recipe's activation
    checkpointing gives way to what the memory requires; otherwise both are the recipe's. A micro_batch in the profile
    is an upper limit in any case.

    Raises:
        ConfigError: the global batch does not divide, the data set is smaller than it, or nothing fits.
    """
    recipe, resources = node.recipe, cluster.resources(node.kind)
    if isinstance(recipe, Test):
        return Fitted(
            Batch(resources.micro_batch or 1, 1, world_size), resources.deepspeed or _deepspeed_by_size(recipe), recipe
        )
    _check_samples(node, recipe)
    try:
        if cluster.gpu_memory_gb is not None:
            return _fit_to_memory(recipe, resources, cluster.precision or "bf16", world_size, cluster.gpu_memory_gb)
        batch = solve_batch(recipe, world_size, resources.micro_batch)
    except ConfigError as error:
        raise ConfigError(f"{node.id}: {error}") from error
    return Fitted(batch, resources.deepspeed or _deepspeed_by_size(recipe), recipe)


def default_deepspeed(recipe: TrainRecipe, world_size: int, precision: Precision, gpu_memory_gb: float) -> str:
    """zero0 if it takes little more of the GPU's memory than zero1, which divides the optimizer state.

    zero0 sends 8 bytes a parameter and update instead of 12, with one norm and one optimizer call instead of one per
    group of parameters.
    """
    replicated, divided = (memory_of(recipe, world_size, name, precision).fixed for name in ("zero0", "zero1"))
    return "zero0" if replicated - divided <= REPLICATED_SHARE * gpu_memory_gb * GB else "zero1"


def _fit_to_memory(
    recipe: TrainRecipe, resources: Resources, precision: Precision, world_size: int, gpu_memory_gb: float
) -> Fitted:
    deepspeed = resources.deepspeed or default_deepspeed(recipe, world_size, precision, gpu_memory_gb)
    smallest, ceiling = smallest_micro_batch(recipe), resources.micro_batch or recipe.optimization.global_batch
    chosen = _without_checkpointing(recipe)
    memory = memory_of(chosen, world_size, deepspeed, precision)
    if memory.most_samples(gpu_memory_gb) < smallest and not isinstance(chosen, ImageTeacher):
        chosen = dataclasses.replace(chosen, activation_checkpointing=True)
        memory = memory_of(chosen, world_size, deepspeed, precision)
    most = memory.most_samples(gpu_memory_gb)
    if most < smallest:
        needed = memory.total(smallest) / USABLE / GB
        raise ConfigError(
            f"gpu_memory_gb must be at least {needed:.1f} for the smallest micro-batch under {deepspeed}, got "
            f"{gpu_memory_gb:g}; use larger GPUs, or set deepspeed=zero3 or zero3_offload for this kind of stage"
        )
    return Fitted(solve_batch(recipe, world_size, min(ceiling, most)), deepspeed, chosen)


def _without_checkpointing(recipe: TrainRecipe) -> TrainRecipe:
    return recipe if isinstance(recipe, ImageTeacher) else dataclasses.replace(recipe, activation_checkpointing=False)


def _deepspeed_by_size(recipe: Recipe) -> str:
    """zero0 if GPUs of any size can hold the whole optimizer state, else zero1."""
    size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
    parameters = sum(map(prod, network_shapes("finetune", size).values()))
    return "zero0" if parameters <= LARGEST_REPLICATED else "zero1"


def _check_samples(node: Node, recipe: TrainRecipe) -> None:
    samples, batch = dataset_of(recipe).train_samples, recipe.optimization.global_batch
    if samples < batch:
        raise ConfigError(
            f"{recipe.dataset} has {samples} training samples, fewer than one global batch of {batch}; set "
            f"{node.kind}.optimization.global_batch to at most {samples}"
        )
