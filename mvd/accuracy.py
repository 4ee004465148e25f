"""Measures a classifier: a quick look during fine-tuning, and the multi-view test that a row is judged by."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mvd.config import DATASETS, ConfigError, Finetune, Precision
from mvd.data.annotations import Entry, Split, load_annotations
from mvd.data.datasets import dataset_paths
from mvd.data.device import normalise
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.evaluate import merge_views
from mvd.models import build_classifier
from mvd.sizes import SIZES
from mvd.stage import Stage
from mvd.train.engine import Engine, Process, agreeing, gather, load_weights
from mvd.train.interrupt import Interrupted, stop_requested
from mvd.train.monitor import Monitor, Progress


@torch.no_grad()
def validate(engine: Engine, entries: list[Entry], stage: Stage, process: Process) -> dict[str, float]:
    """Top-1 in percent on the validation videos, one centre view each: repeatable, but not the test protocol.

    Unreadable videos are named and count as wrong. Every process runs as many forward passes, as ZeRO-3 needs.
    """
    recipe: Finetune = stage.recipe
    clip = SIZES[recipe.size].clip
    views = Views(recipe.sampling, clips=1, crops=1, stride=recipe.stride, clip=clip)
    dataset = ViewDataset(entries, views, stage.execution.reader)
    videos = 2 * stage.execution.micro_batch
    loader = iter(view_loader(dataset, process.rank, process.world_size, videos, stage.execution.workers))
    blank = torch.zeros(1, 3, clip.frames, clip.image_size, clip.image_size, dtype=torch.uint8)
    right = torch.zeros((), device=process.device)
    unreadable: dict[int, str] = {}
    engine.eval()
    for _ in range(math.ceil(math.ceil(len(entries) / process.world_size) / videos)):
        batch = next(loader, {"unreadable": {}})
        unreadable |= batch["unreadable"]
        pixels = batch["views"].flatten(0, 1) if "views" in batch else blank
        logits = engine(normalise(pixels.to(process.device, non_blocking=True)))
        if "views" in batch:
            right += (logits.argmax(dim=1) == batch["labels"].to(process.device)).sum()
    dist.all_reduce(right)
    unread = _name_unreadable(entries, unreadable, process)
    return {"val_top1": 100 * float(right) / len(entries), "val_unreadable": len(unread)}


def run_test(stage: Stage, process: Process) -> dict[str, Any]:
    """The multi-view test: every video decoded once by one process, softmax per view, mean, top-1 and top-5.

    Unreadable videos are listed with the reason and count as wrong. Leaves each process's logits in
    `logits/rank-<n>.npz` of the run directory; returns what result.json says of the test.

    Raises:
        ConfigError: something the user gave cannot work.
        Interrupted: a signal asked for it, between two videos; raised on every process.
    """
    started = time.monotonic()
    with agreeing():
        entries = load_entries(stage, "test")
        model = _load_classifier(stage).to(process.device)
    folder = stage.directory / "logits"
    folder.mkdir(parents=True, exist_ok=True)
    unreadable = _write_logits(model, stage, entries, process, folder / f"rank-{process.rank:04d}.npz")
    if any(gather(stop_requested())):
        raise Interrupted(f"{stage.id}: stopped by a signal; start it again to test all videos", update=0)
    unread = _name_unreadable(entries, unreadable, process)
    if not process.is_first:
        return {}
    top1, top5 = _merge(folder, process.world_size, len(entries))
    monitor = Monitor(stage.directory, process, -1)  # an earlier attempt's record is dropped
    monitor.write(0, 0, {"top1": top1, "top5": top5})
    monitor.close()
    return {
        "top1": top1,
        "top5": top5,
        "videos": len(entries),
        "views": stage.recipe.clips * stage.recipe.crops,
        "unreadable": unread,
        "wall_seconds": time.monotonic() - started,
    }


def load_entries(stage: Stage, split: Split) -> list[Entry]:
    """The videos of a split of the stage's data set."""
    return load_annotations(dataset_paths(stage), split, DATASETS[stage.recipe.dataset].classes)


def _load_classifier(stage: Stage) -> nn.Module:
    """The fine-tuned network; ConfigError where its file is not that of one, head included."""
    model = build_classifier(stage.recipe.size, num_classes=DATASETS[stage.recipe.dataset].classes)
    report = load_weights(model, stage.inputs["finetune"])
    if report.missing:
        missing = ", ".join(report.missing)
        raise ConfigError(f"{stage.inputs['finetune']} lacks {missing}; test the weights of a fine-tuning stage")
    return model.eval()


def _name_unreadable(entries: list[Entry], reasons: dict[int, str], process: Process) -> list[str]:
    """The paths of what any process could not read, by index -> reason; the first process prints them."""
    everyone = {index: reason for part in gather(reasons) for index, reason in part.items()}
    if process.is_first:
        for index, reason in sorted(everyone.items()):
            print(f"unreadable, counted as wrong: {entries[index].path}: {reason}", flush=True)
    return [entries[index].path for index in sorted(everyone)]


@torch.no_grad()
def _write_logits(model: nn.Module, stage: Stage, entries: list[Entry], process: Process, path: Path) -> dict[int, str]:
    """Runs this process's share of the videos; returns index -> reason of those that could not be read."""
    recipe, how = stage.recipe, stage.execution
    classes = DATASETS[recipe.dataset].classes
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    dataset = ViewDataset(entries, views, how.reader)
    loader = view_loader(dataset, process.rank, process.world_size, workers=how.workers)
    progress = Progress("test", len(loader), 0) if process.is_first else None
    logits = np.zeros((len(loader), recipe.clips * recipe.crops, classes), np.float32)
    labels, indices, unreadable = [], [], {}
    started = time.monotonic()
    for done, batch in enumerate(loader, start=1):
        if stop_requested():
            break
        unreadable |= batch["unreadable"]
        if "views" in batch:
            logits[len(indices)] = _forward(model, batch["views"][0], how.micro_batch, how.precision, process.device)
            indices += batch["indices"].tolist()
            labels += batch["labels"].tolist()
        if progress is not None:
            rate = done * process.world_size / (time.monotonic() - started)
            progress.show(done, f"{rate:.1f} videos/s, {len(unreadable)} unreadable")
    if progress is not None:
        progress.close()
    np.savez(path, logits=logits[: len(indices)], indices=np.array(indices, int), labels=np.array(labels, int))
    return unreadable


def _forward(
    model: nn.Module, views: torch.Tensor, at_once: int, precision: Precision, device: torch.device
) -> np.ndarray:
    """uint8 views (V, 3, T, S, S) -> float32 logits (V, classes)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [model(normalise(part.to(device, non_blocking=True))) for part in views.split(at_once)]
    return torch.cat(parts).float().cpu().numpy()


def _merge(folder: Path, world_size: int, videos: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent of all videos, those that could not be read included."""
    parts = [np.load(folder / f"rank-{rank:04d}.npz") for rank in range(world_size)]
    logits, indices, labels = (
        np.concatenate([part[name] for part in parts]) for name in ("logits", "indices", "labels")
    )
    if not len(indices):
        return 0.0, 0.0
    read, views, classes = logits.shape
    merged = merge_views(
        logits.reshape(-1, classes),
        indices.repeat(views),
        np.tile(np.arange(views), read),
        dict(zip(indices.tolist(), labels.tolist(), strict=True)),
    )
    return merged.top1 * read / videos, merged.top5 * read / videos
