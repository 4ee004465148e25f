"""The k-NN probe: how well the features of an encoder in pre-training separate the classes of its own data set."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mvd.config import SIZES, ConfigError, Precision, Pretrain, VideoTeacher, dataset_of
from mvd.data.annotations import Entry
from mvd.data.datasets import load_entries, packet_index
from mvd.data.on_device import normalise
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.views import ViewDataset, Views, view_loader
from mvd.distributed.process import Process, gather
from mvd.distributed.signals import stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.features import copy_encoder, encoder_features
from mvd.evaluation.knn import knn_top1
from mvd.evaluation.unreadable import report_unreadable
from mvd.flops import probe_share
from mvd.models.encoder import VideoEncoder
from mvd.stage import Stage

logger = logging.getLogger(__name__)

TRAIN_VIDEOS, VAL_VIDEOS = 4096, 1024
LARGEST_SHARE = 0.25  # of the training list, for either list: bounds the cost on small data sets
WORTH_SAYING = 0.01  # of the training's compute


def choose_videos(train: Sequence[Entry], val: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The probe's training and validation videos, the same each time, with the classes as even as the lists allow.

    Raises:
        ConfigError: the training videos are all of one class.
    """
    share = math.ceil(LARGEST_SHARE * len(train))
    chosen = evenly(train, min(TRAIN_VIDEOS, share)), evenly(val, min(VAL_VIDEOS, share))
    if len({entry.label for entry in chosen[0]}) < 2:
        raise ConfigError("all training videos have the same label; use lists with labels")
    return chosen


def evenly(entries: Sequence[Entry], count: int) -> list[Entry]:
    """The first `count` of: the first video of each class, the second of each class, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for entry in entries:
        turns.append((seen[entry.label], entry))
        seen[entry.label] += 1
    return [entry for _, entry in sorted(turns, key=lambda turn: turn[0])[:count]]


class Probe:
    """Cosine k-NN top-1 in percent on the pre-training's own labels, one centre view per video.

    Features are means over the tokens of a copy of the encoder, so that the training does not change. Unreadable videos
    are logged and left out. Without usable lists it logs why, once, and measures nothing. An Evaluator
    (mvd.evaluation.evaluator). Generated data is small, so it is probed after every epoch.
    """

    metric = "probe/knn_top1"

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        recipe: Pretrain | VideoTeacher = stage.recipe
        self.every_epochs = 1 if dataset_of(recipe).generated else stage.execution.probe_every
        self.size = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
        self.lists: tuple[list[Entry], list[Entry]] | None = None
        try:
            self.lists = choose_videos(load_entries(stage, "train"), load_entries(stage, "val"))
        except ConfigError as error:
            if process.is_first:
                logger.warning("%s: no k-NN probe, training continues without it: %s", stage.id, error)
        if process.is_first and self.lists is not None:
            self._say_cost(self.lists)

    def _say_cost(self, lists: tuple[list[Entry], list[Entry]]) -> None:
        """Logs how much the probe adds to the training if that is worth knowing."""
        videos, samples = sum(map(len, lists)), dataset_of(self.stage.recipe).train_samples
        share = probe_share(self.stage.recipe, videos, samples, self.every_epochs)
        if share > WORTH_SAYING:
            message = "%s: the k-NN probe of %d videos every %d epoch(s) adds about %.0f %% to the training's compute"
            logger.info(message, self.stage.id, videos, self.every_epochs, 100 * share)

    @torch.no_grad()
    def run(self, network: nn.Module) -> dict[str, float] | None:
        """{"probe/knn_top1", "probe/unreadable"}, {} without usable lists; see Evaluator."""
        lists, how = self.lists, self.stage.execution
        if lists is None or not all(gather(self.lists is not None)):
            return {}
        recipe, clip = self.stage.recipe, self.size.clip
        views = Views(dataset_of(recipe).sampling, clips=1, crops=1, stride=recipe.stride, clip=clip)
        dataset = ViewDataset([*lists[0], *lists[1]], views, how.reader)
        dataset.timeout = ReadTimeout.of_run(self.stage.files.timed_out, how.faults.video_seconds)
        dataset.index = packet_index(self.stage)
        encoder = copy_encoder(network, self.size, self.process.device)
        return probe(
            encoder,
            dataset,
            len(lists[0]),
            self.process,
            how.precision,
            videos=2 * how.micro_batch,
            workers=how.workers,
        )


@torch.no_grad()
def probe(
    encoder: VideoEncoder,
    dataset: ViewDataset,
    trained: int,
    process: Process,
    precision: Precision,
    *,
    videos: int,
    workers: int,
    show: Callable[[int], None] = lambda done: None,
) -> dict[str, float] | None:
    """Classifies the videos of a data set from `trained` on by the ones before; all processes call it together.

    videos: per process and forward pass. show: called with the number of videos that this process has read.
    Returns None if a signal has asked a process to stop.
    """
    features = torch.zeros(len(dataset), encoder.pos_embed.shape[-1], device=process.device)
    known = torch.zeros(len(dataset), device=process.device)
    unreadable: dict[int, str] = {}
    loader = iter(view_loader(dataset, process.rank, process.world_size, videos, workers))
    share = math.ceil(len(dataset) / process.world_size)
    for done in range(math.ceil(share / videos)):
        heartbeat("probing videos", done * videos)
        if any(gather(stop_requested())):
            return None
        batch: dict[str, Any] = next(loader, {"unreadable": {}, "views": []})
        unreadable |= batch["unreadable"]
        if batch["views"]:
            clips = normalise(torch.cat([view.cut(process.device) for view in batch["views"]]))
            indices = batch["indices"].to(process.device)
            with torch.autocast(process.device.type, torch.bfloat16, enabled=precision == "bf16"):
                features[indices] = encoder_features(encoder, clips).float()
            known[indices] = 1
        show(min((done + 1) * videos, share))
    dist.all_reduce(features)
    dist.all_reduce(known)
    unread = report_unreadable(dataset.entries, unreadable, "left out of the probe")
    values: dict[str, float] = {"probe/unreadable": unread}
    labels = torch.tensor([entry.label for entry in dataset.entries], device=process.device)
    train, val = (known > 0).nonzero().flatten().tensor_split([int(known[:trained].sum())])
    if len(train) and len(val):
        values[Probe.metric] = knn_top1(features[train], labels[train], features[val], labels[val])
    return values
