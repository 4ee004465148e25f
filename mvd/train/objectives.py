"""The losses of the four training stages.

The network is any callable, such as DeepSpeed's engine. Losses are float32 scalars in any precision of the forward
pass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mvd.config.sizes import ClipShape
from mvd.models.tokens import cut_tubelets, take, visible_then_masked

Teacher = Callable[[Tensor], Tensor]
MaskedModel = Callable[[Tensor, Tensor], Tensor]


class Targets(NamedTuple):
    """Both teachers' features at the masked tokens, in mask order: each (B, masked, the teachers' width)."""

    image: Tensor
    video: Tensor


class DistillationLoss(NamedTuple):
    """The sum that is minimised and its two parts, which have equal weights; scalars."""

    total: Tensor
    image: Tensor
    video: Tensor


@torch.no_grad()
def distillation_targets(
    image_teacher: Teacher,
    video_teacher: Teacher,
    video: Tensor,
    image_video: Tensor,
    mask: Tensor,
    masked: int,
    *,
    tubelet: int = ClipShape.tubelet,
) -> Targets:
    """Both teachers' features at the masked tokens, not normalised (QUIRKS 26).

    video: (B, 3, T, S, S), normalised, for the video teacher. image_video: the same clip at the image teacher's size;
    the image teacher takes the first of every `tubelet` frames (QUIRKS 27). mask: (B, N) bool, True = masked.
    masked: number of masked tokens per row.

    Raises:
        ValueError: mask and teachers differ in their number of tokens.
    """
    order = visible_then_masked(mask)[:, -masked:]
    frames = image_video[:, :, ::tubelet].transpose(1, 2)
    by_frame = image_teacher(frames.flatten(0, 1))
    image = by_frame.reshape(len(video), -1, by_frame.shape[-1])
    clip = video_teacher(video)
    if not image.shape[1] == clip.shape[1] == mask.shape[1]:
        raise ValueError(
            f"mask and teachers must have the same tokens, got {mask.shape[1]} in the mask, {image.shape[1]} from the "
            f"image teacher and {clip.shape[1]} from the video teacher for clips of {video.shape[2]} frames; "
            f"check tubelet={tubelet}"
        )
    return Targets(take(image, order), take(clip, order))


def feature_loss(predictions: tuple[Tensor, Tensor], targets: Targets) -> DistillationLoss:
    """SmoothL1 of the student's (image, video) predictions against both teachers' features (paper, section 3)."""
    image, video = (
        F.smooth_l1_loss(prediction.float(), target.float())
        for prediction, target in zip(predictions, targets, strict=True)
    )
    return DistillationLoss(image + video, image, video)


def distillation_loss(
    student: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    image_teacher: Teacher,
    video_teacher: Teacher,
    video: Tensor,
    image_video: Tensor,
    mask: Tensor,
    *,
    tubelet: int = ClipShape.tubelet,
) -> DistillationLoss:
    """`feature_loss` of a student for `distillation_targets`; see there for the arguments."""
    predictions = student(video, mask)
    masked = predictions[0].shape[1]
    targets = distillation_targets(image_teacher, video_teacher, video, image_video, mask, masked, tubelet=tubelet)
    return feature_loss(predictions, targets)


def image_reconstruction_loss(model: MaskedModel, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the pixels of masked patches, each normalised by its mean and variance (MAE).

    images: (B, 3, S, S), normalised. mask: (B, N) bool, True = masked.
    """
    predicted = model(images, mask).float()
    patch_size = images.shape[-1] // math.isqrt(mask.shape[1])
    patches = cut_tubelets(images[:, :, None], 1, patch_size)
    pixels = _masked_pixels(patches, mask, predicted.shape[1]).flatten(2)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return F.mse_loss(predicted, (pixels - mean) / (variance + 1e-6).sqrt())


def video_reconstruction_loss(
    model: MaskedModel, video: Tensor, mask: Tensor, *, tubelet: int = ClipShape.tubelet
) -> Tensor:
    """Mean squared error on the pixels of masked tubelets, normalised per tubelet and channel (VideoMAE).

    As in VideoMAE, the ImageNet normalisation is undone first; that matters only because of the 1e-6 that is added to
    the (unbiased) standard deviation. video: (B, 3, T, S, S), normalised. mask: (B, N) bool, True = masked.

    Raises:
        ValueError: the network predicts tubelets of another size.
    """
    predicted = model(video, mask).float()
    patch_size = video.shape[-1] // math.isqrt(mask.shape[1] // (video.shape[2] // tubelet))
    if predicted.shape[-1] != 3 * tubelet * patch_size**2:
        raise ValueError(
            f"the network must predict {3 * tubelet * patch_size**2} values per token for tubelets of {tubelet} x "
            f"{patch_size} x {patch_size} pixels, got {predicted.shape[-1]}; check tubelet={tubelet}"
        )
    tubelets = cut_tubelets(video, tubelet, patch_size)
    pixels = _masked_pixels(tubelets, mask, predicted.shape[1])
    pixels = pixels * pixels.new_tensor(IMAGENET_DEFAULT_STD) + pixels.new_tensor(IMAGENET_DEFAULT_MEAN)
    deviation, mean = torch.std_mean(pixels, dim=2, keepdim=True)
    return F.mse_loss(predicted, ((pixels - mean) / (deviation + 1e-6)).flatten(2))


def _masked_pixels(tokens: Tensor, mask: Tensor, masked: int) -> Tensor:
    """Raw tokens (B, N, 3, t, p, p) -> float32 pixels of the masked ones, channels last: (B, masked, t * p * p, 3)."""
    return take(tokens, visible_then_masked(mask)[:, -masked:]).float().flatten(3).transpose(2, 3)
