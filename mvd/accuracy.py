"""Measures a classifier: a quick look during fine-tuning, and the multi-view test that a row is judged by."""

import hashlib
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mvd.config import ConfigError, Finetune, Precision, facts_of
from mvd.data.annotations import Entry, Split, load_split
from mvd.data.datasets import dataset_paths
from mvd.data.device import normalise
from mvd.data.stalls import ReadLimit
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.evaluate import merge_views
from mvd.files import write_atomically, write_json
from mvd.models import build_classifier
from mvd.sizes import SIZES
from mvd.stage import Stage
from mvd.train.engine import Engine, Process, agreeing, gather, load_weights
from mvd.train.faults import GivenUp, record_fault
from mvd.train.interrupt import Interrupted, stop_requested
from mvd.train.monitor import Monitor, Progress
from mvd.train.preflight import preflight
from mvd.train.watchdog import doing

FEW = 10  # test videos may always be unreadable, whatever the share: it need not be the disk


class Logits(NamedTuple):
    """float32 logits (N, V, C) of N videos, their places in the list of test videos and their labels (N,)."""

    logits: np.ndarray
    indices: np.ndarray
    labels: np.ndarray


@torch.no_grad()
def validate(engine: Engine, entries: list[Entry], stage: Stage, process: Process) -> dict[str, float] | None:
    """Top-1 in percent on the validation videos, one centre view each: repeatable, but not the test protocol.

    Unreadable videos are named and count as wrong. Every process runs as many forward passes, as ZeRO-3 needs. None
    where a signal has asked one of them to stop.
    """
    recipe: Finetune = stage.recipe
    clip = SIZES[recipe.size].clip
    views = Views(recipe.sampling, clips=1, crops=1, stride=recipe.stride, clip=clip)
    dataset = ViewDataset(entries, views, stage.execution.reader)
    dataset.limit = ReadLimit.of_run(stage.directory, stage.execution.faults.video_seconds)
    videos = 2 * stage.execution.micro_batch
    loader = iter(view_loader(dataset, process.rank, process.world_size, videos, stage.execution.workers))
    blank = torch.zeros(1, 3, clip.frames, clip.image_size, clip.image_size, dtype=torch.uint8)
    right = torch.zeros((), device=process.device)
    unreadable: dict[int, str] = {}
    engine.eval()
    for done in range(math.ceil(math.ceil(len(entries) / process.world_size) / videos)):
        doing("validating videos", done * videos)
        if any(gather(stop_requested())):
            return None
        batch = next(loader, {"unreadable": {}, "views": []})
        unreadable |= batch["unreadable"]
        pixels = [views.cut(process.device) for views in batch["views"]] or [blank.to(process.device)]
        logits = engine(normalise(torch.cat(pixels)))
        if batch["views"]:
            right += (logits.argmax(dim=1) == batch["labels"].to(process.device)).sum()
    dist.all_reduce(right)
    unread = _name_unreadable(entries, unreadable, process)
    return {"val_top1": 100 * float(right) / len(entries), "val_unreadable": unread}


def run_test(stage: Stage, process: Process) -> dict[str, Any]:
    """The multi-view test: every video decoded once by one process, softmax per view, mean, top-1 and top-5.

    Unreadable videos are listed with the reason and count as wrong. Leaves each process's logits in
    `logits/rank-<n>.npz` of the job's directory; returns what result.json says of the test, or of this shard of it.

    Raises:
        ConfigError: something the user gave cannot work.
        GivenUp: more videos cannot be read than the profile puts up with; raised on every process.
        HostFault: a machine failed the checks before the start; raised on every process.
        Interrupted: a signal asked for it, between two videos, whose logits are kept; raised on every process.
    """
    started = time.monotonic()
    with agreeing():
        entries = load_entries(stage, "test")
    with agreeing():
        preflight(stage, process, entries)
        doing("starting", 0)
        model = _load_classifier(stage).to(process.device)
    path = _logits_file(stage, process.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    unreadable, stopped = _write_logits(model, stage, entries, process, path)
    if stopped:
        raise Interrupted(f"{stage.id}: stopped by a signal; start it again to test the other videos", update=0)
    unread = _name_unreadable(entries, unreadable, process)
    _stop_at_too_many(stage, unread, math.ceil(len(entries) / stage.execution.shards), process)
    if not process.is_first:
        return {}
    wall = {"wall_seconds": time.monotonic() - started}
    if stage.execution.shards > 1:
        return {"shard": stage.execution.shard, "shards": stage.execution.shards, **wall}
    return {**_accuracy(stage, entries, process.world_size), **wall}


def merge_shards(stage: Stage) -> None:
    """Writes the result.json of a test that is split, once all its shards are complete.

    Every shard calls it at its end, so the last one finds the others' results.

    Raises:
        ConfigError: the list of test videos has changed since a shard read it.
    """
    paths = [part.job_directory / "result.json" for part in stage.in_shards()]
    for path in paths:
        if not path.exists() and path.parent.is_dir():
            # A network disk may remember that there was none; a change to the folder makes it look again.
            tempfile.NamedTemporaryFile(dir=path.parent).close()
    if not all(path.exists() for path in paths):
        return
    seconds = [json.loads(path.read_text())["wall_seconds"] for path in paths]
    accuracy = _accuracy(stage, load_entries(stage, "test"), stage.execution.world_size)
    facts = {"stage": stage.id, "kind": stage.kind, "complete": True}
    write_json(stage.directory / "result.json", {**facts, **accuracy, "wall_seconds": max(seconds)})


def load_entries(stage: Stage, split: Split) -> list[Entry]:
    """The videos of a split of the stage's data set."""
    return load_split(stage.recipe, dataset_paths(stage), split)


def _load_classifier(stage: Stage) -> nn.Module:
    """The fine-tuned network; ConfigError where its file is not that of one, head included."""
    model = build_classifier(stage.recipe.size, num_classes=facts_of(stage.recipe).classes)
    report = load_weights(model, stage.inputs["finetune"])
    if report.missing:
        missing = ", ".join(report.missing)
        raise ConfigError(f"{stage.inputs['finetune']} lacks {missing}; test the weights of a fine-tuning stage")
    return model.eval()


def _name_unreadable(entries: list[Entry], reasons: dict[int, str], process: Process) -> int:
    """Has the first process print what any process could not read, by index -> reason; returns how many these are."""
    everyone = {index: reason for part in gather(reasons) for index, reason in part.items()}
    if process.is_first:
        for index, reason in sorted(everyone.items()):
            print(f"unreadable, counted as wrong: {entries[index].path}: {reason}", flush=True)
    return len(everyone)


def _stop_at_too_many(stage: Stage, unread: int, videos: int, process: Process) -> None:
    """Gives no result where so many of the job's videos could not be read that it must be the disk, not they."""
    limit = stage.execution.faults.unreadable_share
    if unread <= max(limit * videos, FEW):
        return
    message = (
        f"{stage.id}: {unread} of {videos} test videos cannot be read, more than the share of "
        f"faults.unreadable_share={limit:g}; they are named above; mend that, then start it again to test only those"
    )
    if process.is_first:
        record_fault(stage.directory, "unreadable", message)
    raise GivenUp(message)


@torch.no_grad()
def _write_logits(
    model: nn.Module, stage: Stage, entries: list[Entry], process: Process, path: Path
) -> tuple[dict[int, str], bool]:
    """Runs this process's share of the videos, but those that an earlier attempt has left in the file.

    The processes go from video to video together, so that none waits at the end for one that has more of them left.
    Returns index -> reason of those that could not be read, and whether a signal has ended it early on all processes.
    """
    recipe, how = stage.recipe, stage.execution
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    dataset = ViewDataset(entries, views, how.reader)
    dataset.limit = ReadLimit.of_run(stage.directory, how.faults.video_seconds)
    shape = (recipe.clips * recipe.crops, facts_of(recipe).classes)
    rank, processes = how.shard * process.world_size + process.rank, how.shards * process.world_size
    known = _read_logits(path, entries) or Logits(np.zeros((0, *shape), np.float32), np.zeros(0, int), np.zeros(0, int))
    mine = known.indices % processes == rank  # all of them, unless an earlier attempt had another number of processes
    known = Logits(*(array[mine] for array in known))
    loader = view_loader(dataset, rank, processes, workers=how.workers, done=set(known.indices.tolist()))
    most, batches = max(gather(len(loader))), iter(loader)
    progress = Progress("test", most, 0) if process.is_first else None
    logits, labels, indices, unreadable, stopped = [], [], [], {}, False
    started = time.monotonic()
    for done in range(1, most + 1):
        doing("testing videos", done)
        stopped = any(gather(stop_requested()))
        if stopped:
            break
        batch = next(batches, {"unreadable": {}, "views": []})
        unreadable |= batch["unreadable"]
        if batch["views"]:
            pixels = batch["views"][0].cut(process.device)
            logits.append(_forward(model, pixels, how.micro_batch, how.precision, process.device))
            indices += batch["indices"].tolist()
            labels += batch["labels"].tolist()
        if progress is not None:
            rate = done * process.world_size / (time.monotonic() - started)
            progress.show(done, f"{rate:.1f} videos/s, {len(unreadable)} unreadable")
    if progress is not None:
        progress.close()
    new = Logits(np.array(logits, np.float32).reshape(-1, *shape), np.array(indices, int), np.array(labels, int))
    every = [np.concatenate(pair) for pair in zip(known, new, strict=True)]
    write_atomically(path, lambda temporary: _save_logits(temporary, Logits(*every), entries))
    return unreadable, stopped


def _logits_file(stage: Stage, rank: int) -> Path:
    return stage.job_directory / "logits" / f"rank-{rank:04d}.npz"


def _save_logits(path: Path, logits: Logits, entries: list[Entry]) -> None:
    with open(path, "wb") as handle:
        np.savez(handle, list=_digest(entries), **logits._asdict())


def _read_logits(path: Path, entries: list[Entry]) -> Logits | None:
    """What a process has left, or None where it has left nothing for this list of videos."""
    if not path.exists():
        return None
    with np.load(path) as content:
        if "list" not in content or content["list"] != _digest(entries):
            return None
        return Logits(*(content[name] for name in Logits._fields))


def _digest(entries: list[Entry]) -> str:
    return hashlib.sha256("\n".join(f"{entry.path} {entry.label}" for entry in entries).encode()).hexdigest()


def _forward(
    model: nn.Module, views: torch.Tensor, at_once: int, precision: Precision, device: torch.device
) -> np.ndarray:
    """uint8 views (V, 3, T, S, S) on the device -> float32 logits (V, classes)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [model(normalise(part)) for part in views.split(at_once)]
    return torch.cat(parts).float().cpu().numpy()


def _accuracy(stage: Stage, entries: list[Entry], world_size: int) -> dict[str, Any]:
    """Top-1 and top-5 in percent of all videos, those that could not be read included, from all jobs' logits."""
    files = [_logits_file(part, rank) for part in stage.in_shards() for rank in range(world_size)]
    parts = [part for path in files if (part := _read_logits(path, entries))]
    if len(parts) < len(files):
        raise ConfigError(f"{stage.id}: the list of test videos has changed; remove {stage.directory} and test again")
    logits, indices, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    read, views, classes = logits.shape
    top1 = top5 = 0.0
    if read:
        truth = dict(zip(indices.tolist(), labels.tolist(), strict=True))
        merged = merge_views(logits.reshape(-1, classes), indices.repeat(views), np.tile(np.arange(views), read), truth)
        top1, top5 = merged.top1 * read / len(entries), merged.top5 * read / len(entries)
    monitor = Monitor(stage.directory, Process(0, 1, torch.device("cpu")), -1)  # an earlier attempt's record is dropped
    monitor.write(0, 0, {"top1": top1, "top5": top5})
    monitor.close()
    unread = sorted(set(range(len(entries))) - set(indices.tolist()))
    names = [entries[index].path for index in unread]
    return {"top1": top1, "top5": top5, "videos": len(entries), "views": views, "unreadable": names}
