"""Validation during fine-tuning: one centre view of each video."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mvd.config import SIZES, Finetune
from mvd.data.class_names import class_names_of
from mvd.data.datasets import load_entries, packet_index
from mvd.data.on_device import normalise
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.distributed.process import Process, gather
from mvd.distributed.signals import stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.pictures import Attempt, Mistake, Picture, mistakes_picture
from mvd.evaluation.unreadable import report_unreadable
from mvd.stage import Stage

MISTAKES = 6  # drawn, of the surest ones


class Validation:
    """Top-1 in percent on the validation videos, one centre view each: deterministic, but not the test protocol.

    Also the cross-entropy in nats, without label smoothing. Unreadable videos are logged, count as wrong, and are left
    out of the loss. An Evaluator (mvd.evaluation.evaluator).
    """

    metric = "val_top1"

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        self.every_epochs = stage.execution.validate_every
        self.entries = load_entries(stage, "val")
        self.attempt = Attempt("pictures of validation videos")

    @torch.no_grad()
    def run(self, network: nn.Module) -> dict[str, float | Picture] | None:
        """{"val_top1", "val_loss", "val_unreadable"}, and a picture of the surest mistakes; see Evaluator."""
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
        found = torch.zeros(4, len(self.entries), device=process.device)  # by video: read, loss, class, probability
        unreadable: dict[int, str] = {}
        network.eval()
        for done in range(math.ceil(math.ceil(len(self.entries) / process.world_size) / videos)):
            heartbeat("validating videos", done * videos)
            if any(gather(stop_requested())):
                return None
            batch: dict[str, Any] = next(loader, {"unreadable": {}, "views": []})
            unreadable |= batch["unreadable"]
            pixels = [views.cut(process.device) for views in batch["views"]] or [blank.to(process.device)]
            logits = network(normalise(torch.cat(pixels))).float()
            if batch["views"]:
                found[:, batch["indices"].to(process.device)] = _outcome(logits, batch["labels"].to(process.device))
        dist.all_reduce(found)
        unread = report_unreadable(self.entries, unreadable)
        values, wrong = self._values(found.cpu())
        picture = self.attempt(lambda: self._mistakes(dataset, found.cpu(), wrong)) if process.is_first else None
        return {
            **values,
            "val_unreadable": unread,
            **({} if picture is None else {"pictures/surest mistakes": picture}),
        }

    def _values(self, found: Tensor) -> tuple[dict[str, float], list[int]]:
        """Accuracy and loss, and the indices of the wrongly classified videos, the surest first."""
        read, losses, classes, probabilities = found
        labels = torch.tensor([entry.label for entry in self.entries])
        correct = (read > 0) & (classes == labels)
        wrong = ((read > 0) & ~correct).nonzero().flatten()
        values = {self.metric: 100 * float(correct.sum()) / len(self.entries)}
        loss = float(losses.sum() / read.sum())
        if math.isfinite(loss):  # some video was read, and no logit has overflowed
            values["val_loss"] = loss
        return values, wrong[probabilities[wrong].argsort(descending=True, stable=True)].tolist()

    def _mistakes(self, dataset: ViewDataset, found: Tensor, wrong: list[int]) -> Picture | None:
        """The first mistakes, whose videos are read once more; None if there are none."""
        names = class_names_of(self.stage.recipe, self.stage.execution.data)
        mistakes = []
        for index in wrong[:MISTAKES]:
            entry, (_, _, predicted, probability) = self.entries[index], found[:, index].tolist()
            pixels = dataset[index]["views"].cut()[0]
            mistakes.append(Mistake(pixels, Path(entry.path).name, entry.label, int(predicted), probability))
        return mistakes_picture(mistakes, names) if mistakes else None


def _outcome(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (B, classes): 1, the cross-entropy, the predicted class and its probability, each (B,), as (4, B)."""
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([torch.ones_like(losses), losses, predicted.float(), probability])
