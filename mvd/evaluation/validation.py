"""Validation during fine-tuning: one centre view of each video."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mvd.config import SIZES, Finetune
from mvd.data.datasets import load_entries, packet_index
from mvd.data.on_device import normalise
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.distributed.process import Process, gather
from mvd.distributed.signals import stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.unreadable import report_unreadable
from mvd.stage import Stage


class Validation:
    """Top-1 in percent on the validation videos, one centre view each: deterministic, but not the test protocol.

    Unreadable videos are logged and count as wrong. An Evaluator (mvd.evaluation.evaluator).
    """

    metric = "val_top1"

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        self.every_epochs = stage.execution.validate_every
        self.entries = load_entries(stage, "val")

    @torch.no_grad()
    def run(self, network: nn.Module) -> dict[str, float] | None:
        """{"val_top1", "val_unreadable"}; see Evaluator."""
        recipe: Finetune = self.stage.recipe
        how, process = self.stage.execution, self.process
        clip = SIZES[recipe.size].clip
        views = Views(recipe.sampling, clips=1, crops=1, stride=recipe.stride, clip=clip)
        dataset = ViewDataset(self.entries, views, how.reader)
        dataset.timeout = ReadTimeout.of_run(self.stage.files.timed_out, how.faults.video_seconds)
        dataset.index = packet_index(self.stage)
        videos = 2 * how.micro_batch
        loader = iter(view_loader(dataset, process.rank, process.world_size, videos, how.workers))
        blank = torch.zeros(1, 3, clip.frames, clip.image_size, clip.image_size, dtype=torch.uint8)
        correct = torch.zeros((), device=process.device)
        unreadable: dict[int, str] = {}
        network.eval()
        for done in range(math.ceil(math.ceil(len(self.entries) / process.world_size) / videos)):
            heartbeat("validating videos", done * videos)
            if any(gather(stop_requested())):
                return None
            batch: dict[str, Any] = next(loader, {"unreadable": {}, "views": []})
            unreadable |= batch["unreadable"]
            pixels = [views.cut(process.device) for views in batch["views"]] or [blank.to(process.device)]
            logits = network(normalise(torch.cat(pixels)))
            if batch["views"]:
                correct += (logits.argmax(dim=1) == batch["labels"].to(process.device)).sum()
        dist.all_reduce(correct)
        unread = report_unreadable(self.entries, unreadable)
        return {self.metric: 100 * float(correct) / len(self.entries), "val_unreadable": unread}
