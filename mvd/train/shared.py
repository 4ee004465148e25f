"""What a run needs once, however many students of a group train in it: data, teachers and checks."""

import dataclasses
import gc
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mvd.config import ConfigError
from mvd.data.datasets import TrainDataset
from mvd.data.device_batches import DeviceBatches
from mvd.data.loader import train_loader
from mvd.data.sample_check import check_samples
from mvd.data.video.read_timeout import ReadTimeout
from mvd.distributed.preflight import preflight
from mvd.distributed.process import Process, exit_together
from mvd.distributed.watchdog import heartbeat
from mvd.sharing import Student, why_not
from mvd.stage import Stage
from mvd.train.engine import load_deepspeed_config
from mvd.train.tasks import Teachers


class Shared(NamedTuple):
    """What the students of a group use together: the training split, its micro-batches and the teachers."""

    dataset: TrainDataset
    batches: DeviceBatches
    teachers: Teachers


def check_start(stage: Stage, process: Process, dataset: TrainDataset, others: Sequence[Stage] = ()) -> None:
    """Checks the hosts and some samples of the data, whose reads have a timeout from here on; see preflight.

    others: the further students that learn from this data; each has its own list of files that hang.
    """
    logs = [other.files.timed_out for other in others]
    with exit_together():
        dataset.timeout = ReadTimeout.of_run(stage.files.timed_out, stage.execution.faults.video_seconds, logs)
    with exit_together():
        if not process.hosts_checked:
            preflight(stage, process, check_samples(dataset.entries, stage.execution.reader))
    heartbeat("starting", 0)


def start_batches(stage: Stage, dataset: TrainDataset, process: Process, update: int) -> DeviceBatches:
    """This process's micro-batches from an update (counted from 0) to the end of the last epoch.

    Raises:
        ConfigError: see UpdateSampler.
    """
    return DeviceBatches(iter(train_loader(stage, dataset, process.rank, update)), process.device)


def free_memory() -> None:
    """Frees an engine that is not needed any more, which an exception may have referenced."""
    gc.collect()  # two would not fit on a GPU
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # otherwise the checks before the start find the GPU's memory in use


def check_planned_together(stages: Sequence[Stage]) -> None:
    """Rejects stages that cannot share their teachers, or were not planned to.

    Raises:
        ConfigError: says which stages, and why.
    """
    smallest = min(stages, key=lambda stage: stage.recipe.optimization.global_batch)
    for stage in stages:
        reason = why_not(as_student(smallest), as_student(stage))
        if reason:
            raise ConfigError(f"{smallest.id} and {stage.id} cannot share their teachers: {reason}; run them apart")
        how, other = stage.execution, smallest.execution
        if how.data != other.data:
            raise ConfigError(f"{smallest.id} and {stage.id} must have the same data, got {other.data} and {how.data}")
        if _shards_weights(how.deepspeed) != _shards_weights(other.deepspeed):
            raise ConfigError(
                f"{smallest.id} and {stage.id} must both use ZeRO stage 3, or neither, got {other.deepspeed} and "
                f"{how.deepspeed}; set one in cluster.pretrain.deepspeed"
            )
        parts = stage.recipe.optimization.global_batch // samples_of_unit(smallest)
        if (how.micro_batch, how.precision, how.batch_parts) != (other.micro_batch, other.precision, parts):
            raise ConfigError(
                f"{stage.id} must have micro_batch={other.micro_batch}, precision={other.precision} and "
                f"batch_parts={parts} to share its teachers with {smallest.id}, got {how.micro_batch}, "
                f"{how.precision} and {how.batch_parts}; submit them together"
            )


def _shards_weights(deepspeed: str) -> bool:
    """Whether a configuration is of ZeRO stage 3, which rounds otherwise and does so in the whole process."""
    return bool(load_deepspeed_config(deepspeed)["zero_optimization"]["stage"] == 3)


def as_student(stage: Stage) -> Student:
    """A pre-training with the files of its teachers."""
    return Student(stage.id, stage.recipe, stage.inputs)


def samples_of_unit(stage: Stage) -> int:
    """Samples of a unit (mvd.sharing), as planned: the smallest batch of a group, whose student may be complete."""
    return int(stage.recipe.optimization.global_batch) // stage.execution.batch_parts


def loaded_stage(stages: Sequence[Stage]) -> Stage:
    """The stage whose updates the loader reads: one for each unit, for as long as the longest student.

    Its run directory is that of the student with the smallest batch.
    """
    smallest = min(stages, key=lambda stage: stage.recipe.optimization.global_batch)
    how, epochs = smallest.execution, max(stage.recipe.optimization.epochs for stage in stages)
    settings = dataclasses.replace(
        smallest.recipe.optimization,
        global_batch=samples_of_unit(smallest),
        epochs=epochs,
        schedule_epochs=None,
        warmup_epochs=0,
    )
    return dataclasses.replace(
        smallest,
        recipe=dataclasses.replace(smallest.recipe, optimization=settings),
        execution=dataclasses.replace(how, accumulation=how.accumulation // how.batch_parts, batch_parts=1),
    )
