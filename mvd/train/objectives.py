"""The losses of the four training stages.

Each takes the network as anything that can be called, such as DeepSpeed's engine, and returns float32 scalars whatever
precision the forward pass ran in.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mvd.models.encoder import cut_tubelets, take, visible_then_masked
from mvd.sizes import ClipShape

Teacher = Callable[[Tensor], Tensor]
MaskedModel = Callable[[Tensor, Tensor], Tensor]


class DistillationLoss(NamedTuple):
    """The minimised sum and its two equally weighted parts, each a scalar."""

    total: Tensor
    image: Tensor
    video: Tensor


def distillation_loss(
    student: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    image_teacher: Teacher,
    video_teacher: Teacher,
    video: Tensor,
    image_video: Tensor,
    mask: Tensor,
) -> DistillationLoss:
    """SmoothL1 between the student's predictions and both teachers' features at the masked tokens (paper, section 3).

    video: (B, 3, T, S, S), normalised, for student and video teacher. image_video: the same clip at the image
    teacher's size, of which it sees the first frame of each tubelet (QUIRKS 27). mask: (B, N) bool, True = masked.
    The teachers' features are not normalised (QUIRKS 26).
    """
    predicted_image, predicted_video = student(video, mask)
    masked = visible_then_masked(mask)[:, -predicted_image.shape[1] :]
    with torch.no_grad():
        frames = image_video[:, :, :: ClipShape.tubelet].transpose(1, 2)
        features = image_teacher(frames.flatten(0, 1))
        image_target = take(features.reshape(len(video), -1, features.shape[-1]), masked)
        video_target = take(video_teacher(video), masked)
    image = F.smooth_l1_loss(predicted_image.float(), image_target.float())
    clip = F.smooth_l1_loss(predicted_video.float(), video_target.float())
    return DistillationLoss(image + clip, image, clip)


def image_reconstruction_loss(model: MaskedModel, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the masked patches' pixels, each patch normalised by its mean and variance (MAE).

    images: (B, 3, S, S), normalised. mask: (B, N) bool, True = masked.
    """
    predicted = model(images, mask).float()
    patch_size = images.shape[-1] // math.isqrt(mask.shape[1])
    patches = cut_tubelets(images[:, :, None], 1, patch_size)
    pixels = _masked_pixels(patches, mask, predicted.shape[1]).flatten(2)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return F.mse_loss(predicted, (pixels - mean) / (variance + 1e-6).sqrt())


def video_reconstruction_loss(model: MaskedModel, video: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the masked tubelets' pixels, each channel of each normalised by itself (VideoMAE).

    Like VideoMAE, it first undoes the ImageNet normalisation; that only matters for the 1e-6 which is added to a
    channel's (unbiased) standard deviation. video: (B, 3, T, S, S), normalised. mask: (B, N) bool, True = masked.
    """
    predicted = model(video, mask).float()
    patch_size = video.shape[-1] // math.isqrt(mask.shape[1] // (video.shape[2] // ClipShape.tubelet))
    tubelets = cut_tubelets(video, ClipShape.tubelet, patch_size)
    pixels = _masked_pixels(tubelets, mask, predicted.shape[1])
    pixels = pixels * pixels.new_tensor(IMAGENET_DEFAULT_STD) + pixels.new_tensor(IMAGENET_DEFAULT_MEAN)
    deviation, mean = torch.std_mean(pixels, dim=2, keepdim=True)
    return F.mse_loss(predicted, ((pixels - mean) / (deviation + 1e-6)).flatten(2))


def _masked_pixels(tokens: Tensor, mask: Tensor, masked: int) -> Tensor:
    """Raw tokens (B, N, 3, t, p, p) -> float32 pixels of the masked ones, channels last: (B, masked, t * p * p, 3)."""
    return take(tokens, visible_then_masked(mask)[:, -masked:]).float().flatten(3).transpose(2, 3)
