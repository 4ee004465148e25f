"""Measures a classifier: a quick look during fine-tuning, and the multi-view test that a row is judged by."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mvd.config import DATASETS, Finetune, Precision, Stage
from mvd.data.annotations import Entry, load_annotations
from mvd.data.datasets import dataset_paths
from mvd.data.device import normalise
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.evaluate import merge_views
from mvd.models import build_classifier
from mvd.models.checkpoints import load_official
from mvd.sizes import SIZES
from mvd.train.engine import Engine, Process
from mvd.train.monitor import Monitor, Progress


@torch.no_grad()
def validate(engine: Engine, stage: Stage, process: Process) -> dict[str, float]:
    """Top-1 in percent on the validation videos, one centre view each: repeatable, but not the test protocol.

    Unreadable videos count as wrong. Every process runs the same number of forward passes, as ZeRO-3 needs.
    """
    recipe: Finetune = stage.recipe
    clip = SIZES[recipe.size].clip
    views = Views(recipe.sampling, clips=1, crops=1, stride=recipe.stride, clip=clip)
    entries = _entries(stage, "val")
    dataset = ViewDataset(entries, views, stage.execution.reader)
    videos = 2 * stage.execution.micro_batch
    loader = iter(view_loader(dataset, process.rank, process.world_size, videos, stage.execution.workers))
    blank = torch.zeros(1, 3, clip.frames, clip.image_size, clip.image_size, dtype=torch.uint8)
    right = torch.zeros((), device=process.device)
    engine.eval()
    for _ in range(math.ceil(math.ceil(len(entries) / process.world_size) / videos)):
        batch = next(loader, {})
        pixels = batch["views"].flatten(0, 1) if "views" in batch else blank
        logits = engine(normalise(pixels.to(process.device, non_blocking=True)))
        if "views" in batch:
            right += (logits.argmax(dim=1) == batch["labels"].to(process.device)).sum()
    dist.all_reduce(right)
    return {"val_top1": 100 * float(right) / len(entries)}


def run_test(stage: Stage, process: Process) -> dict[str, Any]:
    """The multi-view test: every video decoded once by one process, softmax per view, mean, top-1 and top-5.

    Unreadable videos are listed with the reason and count as wrong. Leaves each process's logits in
    `logits/rank-<n>.npz` of the run directory; returns what result.json says of the test.
    """
    started = time.monotonic()
    entries = _entries(stage, "test")
    folder = stage.directory / "logits"
    folder.mkdir(parents=True, exist_ok=True)
    unreadable = _write_logits(stage, entries, process, folder / f"rank-{process.rank:04d}.npz")
    reports: list[dict[int, str]] = [{} for _ in range(process.world_size)]
    dist.all_gather_object(reports, unreadable)
    if not process.is_first:
        return {}
    reasons = {index: reason for report in reports for index, reason in report.items()}
    top1, top5 = _merge(folder, process.world_size, len(entries))
    monitor = Monitor(stage.directory, process, 0)
    monitor.write(0, 0, {"top1": top1, "top5": top5})
    monitor.close()
    for index, reason in sorted(reasons.items()):
        print(f"unreadable, counted as wrong: {entries[index].path}: {reason}", flush=True)
    return {
        "top1": top1,
        "top5": top5,
        "videos": len(entries),
        "views": stage.recipe.clips * stage.recipe.crops,
        "unreadable": [entries[index].path for index in sorted(reasons)],
        "wall_seconds": time.monotonic() - started,
    }


def _entries(stage: Stage, split: str) -> list[Entry]:
    return load_annotations(dataset_paths(stage), split, DATASETS[stage.recipe.dataset].classes)


@torch.no_grad()
def _write_logits(stage: Stage, entries: list[Entry], process: Process, path: Path) -> dict[int, str]:
    """Runs this process's share of the videos; returns index -> reason of those that could not be read."""
    recipe, how = stage.recipe, stage.execution
    classes = DATASETS[recipe.dataset].classes
    model = build_classifier(recipe.size, num_classes=classes)
    load_official(model, stage.inputs["finetune"])
    model.to(process.device).eval()
    views = Views(recipe.sampling, recipe.clips, recipe.crops, recipe.stride, SIZES[recipe.size].clip)
    dataset = ViewDataset(entries, views, how.reader)
    loader = view_loader(dataset, process.rank, process.world_size, workers=how.workers)
    progress = Progress("test", len(loader), 0) if process.is_first else None
    logits = np.zeros((len(loader), recipe.clips * recipe.crops, classes), np.float32)
    labels, indices, unreadable = [], [], {}
    started = time.monotonic()
    for done, batch in enumerate(loader, start=1):
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
    logits, indices, labels = (np.concatenate([part[name] for part in parts]) for name in ("logits", "indices", "labels"))
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
