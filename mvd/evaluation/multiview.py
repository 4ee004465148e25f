"""The multi-view test of a classifier, which gives a row's accuracy; in one job or split over several (shards)."""

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mvd.config import SIZES, ConfigError, Precision, dataset_of
from mvd.data.annotations import Entry
from mvd.data.datasets import load_entries, packet_index
from mvd.data.loader import worker_count
from mvd.data.on_device import normalise
from mvd.data.sample_check import check_samples
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.distributed.faults import RunFailed, record_fault
from mvd.distributed.preflight import preflight
from mvd.distributed.process import Process, exit_together, gather
from mvd.distributed.signals import Interrupted, stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.logits import Logits, concatenate, read_logits, save_logits
from mvd.evaluation.merging import merge_views
from mvd.evaluation.statistics import wilson_interval
from mvd.evaluation.unreadable import report_unreadable
from mvd.models import build_classifier
from mvd.models.checkpoints import load_weights
from mvd.monitoring.metrics import Metrics
from mvd.monitoring.progress import Progress
from mvd.provenance import result_facts
from mvd.stage import Stage

logger = logging.getLogger(__name__)


class Tested(NamedTuple):
    """What a process has tested.

    unreadable: index -> reason of its unreadable videos. not_finite: indices of the videos with such logits. stopped:
    whether a signal has stopped all processes early. videos_per_second: of all processes, without the videos that were
    read before their first; None if that is not known.
    """

    unreadable: dict[int, str]
    not_finite: list[int]
    stopped: bool
    videos_per_second: float | None


def run_test(stage: Stage, process: Process) -> dict[str, Any]:
    """The multi-view test: each video is decoded once by one process; softmax per view, mean, top-1 and top-5.

    Unreadable videos are logged with the reason and count as wrong. Each process writes its logits to
    `logits/rank-<n>.npz` in the job's directory. Returns the content of result.json for the test or this shard of it.

    Raises:
        ConfigError: an invalid setting or input.
        RunFailed: more videos cannot be read than faults.unreadable_share allows, or logits are not finite; raised on
            every process.
        HostFault: a machine failed the checks before the start; raised on every process.
        Interrupted: stopped by a signal between two videos; the logits so far are kept. Raised on every process.
    """
    started = time.monotonic()
    with exit_together():
        entries = load_entries(stage, "test")
    with exit_together():
        preflight(stage, process, check_samples(entries, stage.execution.reader))
        heartbeat("starting", 0)
        model = load_classifier(stage).to(process.device)
    tested = write_logits(model, stage, entries, process)
    if tested.stopped:
        raise Interrupted(f"{stage.id}: stopped by a signal; start it again to test the remaining videos", update=0)
    unread = report_unreadable(entries, tested.unreadable)
    _stop_at_not_finite(stage, entries, gather(tested.not_finite))
    _stop_at_too_many(stage, unread, math.ceil(len(entries) / stage.execution.shards), process)
    if not process.is_first:
        return {}
    wall = {"wall_seconds": time.monotonic() - started}
    if stage.execution.shards > 1:
        return {"shard": stage.execution.shard, "shards": stage.execution.shards, **wall}
    return {**_accuracy(stage, entries, process.world_size), **wall}


def merge_shards(stage: Stage) -> None:
    """Writes the result.json of a test in shards if all shards are complete.

    Every shard calls it at its end, so the last one finds all results.

    Raises:
        ConfigError: the list of test videos has changed since a shard read it.
    """
    shards = [part.job_files for part in stage.in_shards()]
    for files in shards:
        if not files.result.exists() and files.path.is_dir():
            # NFS may have cached that the file does not exist; a change of the folder invalidates the cache.
            tempfile.NamedTemporaryFile(dir=files.path).close()
    results = [files.read_result() for files in shards]
    complete = [result for result in results if result is not None]
    if len(complete) < len(shards):
        return
    accuracy = _accuracy(stage, load_entries(stage, "test"), stage.execution.world_size)
    facts = {"stage": stage.id, "kind": stage.kind, "complete": True}
    seconds = max(result["wall_seconds"] for result in complete)
    stage.files.write_result({**facts, **accuracy, "wall_seconds": seconds, "provenance": result_facts(stage)})


def load_classifier(stage: Stage) -> nn.Module:
    """The fine-tuned network; ConfigError if the file is not one of a whole classifier with its head."""
    model = build_classifier(stage.recipe.size, num_classes=dataset_of(stage.recipe).classes)
    report = load_weights(model, stage.inputs["finetune"])
    if report.missing:
        missing = ", ".join(report.missing)
        raise ConfigError(f"{stage.inputs['finetune']} lacks {missing}; test the weights of a fine-tuning stage")
    return model.eval()


def _stop_at_too_many(stage: Stage, unread: int, videos: int, process: Process) -> None:
    """Raises RunFailed if so many of the job's videos are unreadable that the disk is the likely cause."""
    faults = stage.execution.faults
    if not faults.too_many_unreadable(unread, videos):
        return
    message = (
        f"{stage.id}: {unread} of {videos} test videos cannot be read, more than "
        f"faults.unreadable_share={faults.unreadable_share:g} allows; they are listed above; "
        "fix that, then start the stage again to test only those"
    )
    if process.is_first:
        record_fault(stage.files, "unreadable", message)
    raise RunFailed(message)


def _stop_at_not_finite(stage: Stage, entries: Sequence[Entry], found: Sequence[Sequence[int]]) -> None:
    """Raises RunFailed for logits that are not finite; found: indices of their videos, of each process."""
    bad = sorted(index for indices in found for index in indices)
    if bad:
        raise RunFailed(
            f"{stage.id}: the logits of {len(bad)} of {len(entries)} test videos are not finite, first those of "
            f"{entries[bad[0]].path}; check weights and precision, then start the stage again to test only these"
        )


@torch.no_grad()
def write_logits(model: nn.Module, stage: Stage, entries: list[Entry], process: Process) -> Tested:
    """Tests this process's share of the videos, except for those already in its file from an earlier attempt."""
    recipe, how = stage.recipe, stage.execution
    path = stage.job_files.logits(process.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    dataset = ViewDataset(entries, views, how.reader)
    dataset.timeout = ReadTimeout.of_run(stage.files.timed_out, how.faults.video_seconds)
    dataset.index = packet_index(stage)
    rank, processes = how.shard * process.world_size + process.rank, how.shards * process.world_size
    none = Logits.none(recipe.clips * recipe.crops, dataset_of(recipe).classes)
    known = read_logits(path, entries) or none
    wanted = known.indices % processes == rank  # all, unless the number of processes has changed
    known = known.where(wanted & _is_finite(known))
    loader = view_loader(dataset, rank, processes, workers=how.workers, done=set(known.indices.tolist()))
    parts, stopped = [known], False
    unreadable: dict[int, str] = {}
    progress = _TestProgress(process, max(gather(len(loader))))
    batches = iter(loader)
    # All processes advance video by video together; otherwise one could wait at the end until the watchdog acts.
    for turn in range(1, progress.turns + 1):
        heartbeat("testing videos", turn)
        stopped = any(gather(stop_requested()))
        if stopped:
            break
        batch: dict[str, Any] = next(batches, {"unreadable": {}, "views": []})
        unreadable |= batch["unreadable"]
        if batch["views"]:
            pixels = batch["views"][0].cut(process.device)
            logits = _forward(model, pixels, how.micro_batch, how.precision, process.device)
            parts.append(Logits(logits[None], batch["indices"].numpy(), batch["labels"].numpy()))
        progress.show(turn, len(unreadable))
    progress.close()
    tested = concatenate(parts)
    save_logits(path, tested, entries)
    return Tested(
        unreadable,
        tested.indices[~_is_finite(tested)].tolist(),
        stopped,
        progress.steady_rate(2 * worker_count(how.workers)),
    )


def _is_finite(tested: Logits) -> NDArray[np.bool_]:
    """Whether all logits of a video are, (N,)."""
    return np.asarray(np.isfinite(tested.logits).all(axis=(1, 2)))


class _TestProgress:
    """The progress line of the first process, and videos/s of all."""

    def __init__(self, process: Process, turns: int) -> None:
        self.turns, self.world_size, self.started = turns, process.world_size, time.monotonic()
        self.shown: list[float] = []  # when each turn ended
        self.line = Progress("test", turns, 0) if process.is_first else None

    def show(self, turn: int, unreadable: int) -> None:
        self.shown.append(time.monotonic())
        if self.line is not None:
            rate = turn * self.world_size / (time.monotonic() - self.started)
            self.line.show(turn, f"{rate:.1f} videos/s, {unreadable} unreadable")

    def steady_rate(self, read_before: int) -> float | None:
        """Videos/s; None for fewer than two turns.

        read_before: a process's videos that its loader may read while the first one is waited for. They are left out,
        as long as two turns remain.
        """
        if len(self.shown) < 2:
            return None
        first = min(read_before, len(self.shown) - 2)
        return (len(self.shown) - 1 - first) * self.world_size / (self.shown[-1] - self.shown[first])

    def close(self) -> None:
        if self.line is not None:
            self.line.close()


def _forward(
    model: nn.Module, views: torch.Tensor, at_once: int, precision: Precision, device: torch.device
) -> NDArray[np.float32]:
    """uint8 views (V, 3, T, S, S) on the device -> float32 logits (V, classes)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [model(normalise(part)) for part in torch.split(views, at_once)]
    logits: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
    return logits


def _accuracy(stage: Stage, entries: list[Entry], world_size: int) -> dict[str, Any]:
    """Top-1, its 95 % interval and top-5 in percent of all videos, unreadable ones included, from all jobs' logits."""
    files = [part.job_files.logits(rank) for part in stage.in_shards() for rank in range(world_size)]
    parts = [part for path in files if (part := read_logits(path, entries))]
    if len(parts) < len(files):
        raise ConfigError(f"{stage.id}: the list of test videos has changed; remove {stage.directory} and test again")
    logits, indices, labels = concatenate(parts)
    read, views, classes = logits.shape
    top1 = top5 = 0.0
    if read:
        truth = dict(zip(indices.tolist(), labels.tolist(), strict=True))
        merged = merge_views(logits.reshape(-1, classes), indices.repeat(views), np.tile(np.arange(views), read), truth)
        top1, top5 = merged.top1 * read / len(entries), merged.top5 * read / len(entries)
    _write_curves(stage, {"top1": top1, "top5": top5})
    unread = sorted(set(range(len(entries))) - set(indices.tolist()))
    names = [entries[index].path for index in unread]
    interval = [100 * bound for bound in wilson_interval(round(top1 * len(entries) / 100), len(entries))]
    accuracy = {"top1": top1, "top1_interval": interval, "top5": top5}
    return {**accuracy, "videos": len(entries), "views": views, "unreadable": names}


def _write_curves(stage: Stage, numbers: Mapping[str, float]) -> None:
    """One point, which replaces that of an earlier attempt."""
    metrics = Metrics.of_stage(stage, Process(0, 1, torch.device("cpu")), resumed_at=-1)
    metrics.write(0, 0, numbers)
    metrics.close()
