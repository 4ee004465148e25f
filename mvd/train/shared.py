"""What a run needs once, however many students of a group train in it: data, teachers and checks."""

import gc
from typing import NamedTuple

import torch

from mvd.data.datasets import TrainDataset
from mvd.data.device_batches import DeviceBatches
from mvd.data.loader import train_loader
from mvd.data.sample_check import check_samples
from mvd.data.video.read_timeout import ReadTimeout
from mvd.distributed.preflight import preflight
from mvd.distributed.process import Process, exit_together
from mvd.distributed.watchdog import heartbeat
from mvd.stage import Stage
from mvd.train.tasks import Teachers


class Shared(NamedTuple):
    """What the students of a group use together: the training split, its micro-batches and the teachers."""

    dataset: TrainDataset
    batches: DeviceBatches
    teachers: Teachers


def check_start(stage: Stage, process: Process, dataset: TrainDataset) -> None:
    """Checks the hosts and some samples of the data, whose reads have a timeout from here on; see preflight."""
    with exit_together():
        dataset.timeout = ReadTimeout.of_run(stage.files.timed_out, stage.execution.faults.video_seconds)
    with exit_together():
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
