"""What happens to a batch on the device: normalising, random erasing, mixing."""

from itertools import groupby
from typing import Any

import numpy as np
import torch

from mvd.config import Finetune, Pretrain, TrainRecipe, dataset_of
from mvd.data.mixup import ClipMixup

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: torch.Tensor, channel_axis: int = 1) -> torch.Tensor:
    """uint8 pixels -> float32 with ImageNet's mean and standard deviation taken out of each channel."""
    shape = [1] * pixels.ndim
    shape[channel_axis] = 3
    mean = torch.tensor(MEAN, device=pixels.device).view(shape)
    std = torch.tensor(STD, device=pixels.device).view(shape)
    return pixels.float().div_(255).sub_(mean).div_(std)


def prepare(batch: dict[str, Any], recipe: TrainRecipe, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Moves a loader's batch to the device and makes what the stage's objective takes, pixels normalised.

    Image teacher: {"images" (B, 3, S, S), "mask" (B, positions)}. Video teacher: {"video" (B, 3, T, S, S), "mask"
    (B, tokens)}. Student: the same with "image_video" (B, 3, T, S', S'), which is "video" itself where the sizes are
    equal. Fine-tuning: {"video", erased and mixed, "targets" (clips, classes)}.
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
    """Fills each clip's box (top, left, height, width), the same in all frames, with normal noise, in place.

    clips are normalised (N, 3, T, H, W); boxes (N, 4) and seeds (N,) are on the CPU. Each pixel of each frame has
    its own noise, from the clip's own seed, so that it does not depend on the clip's neighbours.
    """
    for clip, (top, left, height, width), seed in zip(clips, boxes.tolist(), seeds.tolist(), strict=True):
        if height == 0:
            continue
        generator = torch.Generator(clips.device).manual_seed(seed)
        region = clip[:, :, top : top + height, left : left + width]
        region.copy_(torch.randn(region.shape, generator=generator, device=clips.device))


def _mix(
    clips: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor, recipe: Finetune
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each unit, that is each run of clips with one mix seed, with its mixing group's draw."""
    mixing = recipe.mixing
    mixup = ClipMixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        switch_prob=mixing.switch,
        label_smoothing=mixing.smoothing,
        num_classes=dataset_of(recipe).classes,
        cutmix_axes=mixing.cutmix_axes,
    )
    videos, targets, start = [], [], 0
    for seed, run in groupby(seeds.tolist()):
        unit = slice(start, start + len(list(run)))
        mix = mixup.draw(clips.shape[-2], clips.shape[-1], np.random.RandomState(seed))
        video, target = mixup.apply(clips[unit], labels[unit], mix)
        videos.append(video)
        targets.append(target)
        start = unit.stop
    return torch.cat(videos), torch.cat(targets)
