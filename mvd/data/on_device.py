"""Transforms of a batch on the device: normalisation, random erasing, Mixup and CutMix."""

from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mvd.config import Finetune, Pretrain, TrainRecipe, dataset_of
from mvd.data.mixup import ClipMixup

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: torch.Tensor, channel_axis: int = 1) -> torch.Tensor:
    """uint8 pixels -> float32, normalised with ImageNet's mean and standard deviation."""
    shape = [1] * pixels.ndim
    shape[channel_axis] = 3
    mean, std = _imagenet(pixels.device)
    return pixels.float().div_(255).sub_(mean.view(shape)).div_(std.view(shape))


@lru_cache
def _imagenet(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's mean and standard deviation on a device, copied there once."""
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def prepare(batch: dict[str, Any], recipe: TrainRecipe, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Move a loader's batch to the device and build the inputs of the stage's objective, pixels normalised.

    Image teacher: {"images" (B, 3, S, S), "mask" (B, positions)}.
    Video teacher: {"video" (B, 3, T, S, S), "mask" (B, tokens)}.
    Student: the same plus "image_video" (B, 3, T, S', S'), which is "video" itself if the two sizes are equal.
    Fine-tuning: {"video" (clips, 3, T, S, S), erased and mixed, "targets" (clips, classes)}.
    """
    pixels: dict[str, torch.Tensor] = {
        name: normalise(batch[name].to(device, non_blocking=True))
        for name in ("images", "video", "image_video")
        if name in batch
    }
    if isinstance(recipe, Finetune):
        erase(pixels["video"], batch["erase"], batch["noise_seeds"])
        labels = batch["labels"].to(device, non_blocking=True)
        video, targets = _mix(pixels["video"], labels, batch["mix_seeds"], recipe)
        return {"video": video, "targets": targets}
    if isinstance(recipe, Pretrain):
        pixels.setdefault("image_video", pixels["video"])
    return {**pixels, "mask": batch["mask"].to(device, non_blocking=True)}


def erase(clips: torch.Tensor, boxes: torch.Tensor, seeds: torch.Tensor) -> None:
    """Fill each clip's box with normal noise, in place; the box is the same in all frames of the clip.

    Args:
        clips: normalised, (N, 3, T, H, W).
        boxes: (N, 4) of (top, left, height, width), on the CPU.
        seeds: (N,), on the CPU. Every clip has its own, so its noise does not depend on the rest of the batch.
    """
    for clip, (top, left, height, width), seed in zip(clips, boxes.tolist(), seeds.tolist(), strict=True):
        if height == 0:
            continue
        generator = torch.Generator(clips.device).manual_seed(seed)
        region = clip[:, :, top : top + height, left : left + width]
        region.copy_(torch.randn(region.shape, generator=generator, device=clips.device))


def mixup_of(recipe: Finetune) -> ClipMixup:
    """How a recipe mixes."""
    mixing = recipe.mixing
    return ClipMixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        switch_prob=mixing.switch,
        label_smoothing=mixing.smoothing,
        num_classes=dataset_of(recipe).classes,
        cutmix_axes=mixing.cutmix_axes,
    )


def _mix(
    clips: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor, recipe: Finetune
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each run of clips that have the same mix seed, with one draw from that seed."""
    mixup = mixup_of(recipe)
    videos, targets, start = [], [], 0
    for seed, run in groupby(seeds.tolist()):
        unit = slice(start, start + len(list(run)))
        mix = mixup.draw(clips.shape[-2], clips.shape[-1], np.random.RandomState(seed))
        video, target = mixup.apply(clips[unit], labels[unit], mix)
        videos.append(video)
        targets.append(target)
        start = unit.stop
    return torch.cat(videos), torch.cat(targets)
