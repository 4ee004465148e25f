"""The sample order and the training loader, the same on any number of processes.

Update u of an epoch takes the u-th global batch of the epoch's permutation; an incomplete last batch is dropped. Each
process takes a contiguous share of the batch (or of each of its `batch_parts`), split into micro-batches. In
fine-tuning a global batch is split into mixing groups and each group into mirrored pairs (the j-th video from the front
and the j-th from the back), because those two are mixed with each other: any whole number of pairs can then be mixed
separately, with the group's one draw.
"""

import gc
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from mvd.config import ConfigError, Finetune, TrainRecipe
from mvd.data.datasets import SampleKey, TrainDataset
from mvd.data.rng import epoch_order
from mvd.data.started_loader import StartedLoader
from mvd.data.workers import LOADER_START_METHOD, follow_parent, keep_freed_memory
from mvd.host import usable_cores
from mvd.stage import Stage


class LoaderStats:
    """Loader statistics for the curves: decoding time of a sample (ms), and batches waiting in the queue."""

    def __init__(self) -> None:
        self.decode_ms: list[float] = []
        self.depths: list[int] = []

    def note(self, batch: dict[str, Any], batches: Iterator[dict[str, Any]]) -> None:
        """Record one batch, and how many more its iterator has ready."""
        self.decode_ms += batch["decode_ms"].tolist()
        queue = getattr(batches, "_data_queue", None)  # absent without worker processes
        self.depths.append(0 if queue is None else queue.qsize())

    def report(self) -> dict[str, float]:
        """The means since the last report."""
        means = {
            "decode_ms": sum(self.decode_ms) / len(self.decode_ms),
            "loader_queue": sum(self.depths) / len(self.depths),
        }
        self.decode_ms.clear()
        self.depths.clear()
        return means


class Block(NamedTuple):
    """Samples that must stay together: a single one, or a mirrored pair of a mixing group."""

    group: int
    samples: tuple[int, ...]


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Whole global batches in an epoch.

    Raises:
        ConfigError: there is not even one.
    """
    if samples < global_batch:
        raise ConfigError(
            f"the training list holds {samples} samples, fewer than one global batch of {global_batch}; "
            "use a smaller global batch or more data"
        )
    return samples // global_batch


def update_blocks(recipe: TrainRecipe, order: list[int], update: int) -> list[Block]:
    """The blocks of one update of an epoch; mixing groups are numbered throughout the epoch."""
    total = recipe.optimization.global_batch
    samples = order[update * total : (update + 1) * total]
    if not isinstance(recipe, Finetune):
        return [Block(0, (sample,)) for sample in samples]
    size = recipe.mixing.group
    blocks = []
    for start in range(0, total, size):
        group = samples[start : start + size]
        number = (update * total + start) // size
        blocks += [Block(number, (group[j], group[-1 - j])) for j in range(size // 2)]
    return blocks


def unit_order(blocks: list[Block]) -> list[tuple[int, int]]:
    """The (group, sample) pairs of a micro-batch: per group the front samples, then their partners in reverse."""
    ordered = []
    for group, members in groupby(blocks, key=lambda block: block.group):
        samples = [block.samples for block in members]
        mirrored = [s[0] for s in samples] + [partner for s in reversed(samples) for partner in s[1:]]
        ordered += [(group, sample) for sample in mirrored]
    return ordered


class UpdateSampler(Sampler[list[SampleKey]]):
    """One rank's micro-batches from `start_update` to the end of the last epoch; stateless between iterations.

    Raises:
        ConfigError: the execution's batch differs from the recipe's, a micro-batch would split a mixed pair, or there
            are fewer samples than a global batch.
    """

    def __init__(self, stage: Stage, samples: int, rank: int, start_update: int = 0) -> None:
        execution, optimization = stage.execution, stage.recipe.optimization
        batch = execution.micro_batch * execution.accumulation * execution.world_size
        if batch != optimization.global_batch:
            raise ConfigError(
                f"stage {stage.id}: micro_batch x accumulation x world_size must equal the recipe's global_batch, got "
                f"{execution.micro_batch} x {execution.accumulation} x {execution.world_size} = {batch} and "
                f"{optimization.global_batch}"
            )
        if isinstance(stage.recipe, Finetune) and execution.micro_batch % 2:
            raise ConfigError(
                f"stage {stage.id}: micro_batch must be even, because videos are mixed in pairs, got "
                f"{execution.micro_batch}"
            )
        if execution.accumulation % execution.batch_parts:
            raise ConfigError(
                f"stage {stage.id}: accumulation must be a multiple of batch_parts, got {execution.accumulation} and "
                f"{execution.batch_parts}"
            )
        self.recipe: TrainRecipe = stage.recipe
        self.execution = execution
        self.samples = samples
        self.rank = rank
        self.start_update = start_update
        self.steps_per_epoch = steps_per_epoch(samples, optimization.global_batch)
        self.updates: int = self.steps_per_epoch * optimization.epochs

    def __len__(self) -> int:
        return max(self.updates - self.start_update, 0) * self.execution.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order: list[int] = []
        for update in range(self.start_update, self.updates):
            epoch, step = divmod(update, self.steps_per_epoch)
            if step == 0 or not order:
                order = epoch_order(self.recipe.seed, epoch, self.samples)
            for blocks in self._micro_batches(update_blocks(self.recipe, order, step)):
                yield [SampleKey(epoch, sample, group) for group, sample in unit_order(blocks)]

    def _micro_batches(self, blocks: list[Block]) -> Iterator[list[Block]]:
        """This rank's micro-batches of an update: of each part of it, one after the other, the rank's own share."""
        how = self.execution
        part = len(blocks) // how.batch_parts
        share = part // how.world_size
        micro = share * how.batch_parts // how.accumulation
        for first in range(self.rank * share, len(blocks), part):
            yield from (blocks[start : start + micro] for start in range(first, first + share, micro))


def train_loader(stage: Stage, dataset: TrainDataset, rank: int, start_update: int = 0) -> DataLoader[dict[str, Any]]:
    """The loader for the whole run: micro-batches from `start_update` on, across epoch boundaries.

    Raises:
        ConfigError: see UpdateSampler.
    """
    workers = worker_count(stage.execution.workers)
    return StartedLoader(
        dataset,
        batch_sampler=UpdateSampler(stage, len(dataset), rank, start_update),
        num_workers=workers,
        multiprocessing_context=LOADER_START_METHOD if workers else None,
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the default draws from the global state, which a resume restores
    )


def worker_count(most: int) -> int:
    """Loader processes of one training process: no more than the cores it may use, and no more than `most`."""
    return min(most, usable_cores())


def start_worker(_: int) -> None:
    """Set up a loader process: single-threaded, and ignoring the job's signals.

    A worker that died on the job's signal would prevent the final checkpoint.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    follow_parent()
    keep_freed_memory()
    # The 400,000 objects of the training process would be collected with the worker's own: seldom, for they are many,
    # and each time with a copy of their memory.
    gc.freeze()
    gc.collect()
