"""CPU-side clip transforms: uint8 (T, H, W, 3) in and out.

Random functions take the numpy Generator to draw from; one draw applies to all frames of a clip.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

Frames: TypeAlias = np.ndarray | Sequence[np.ndarray]  # uint8 (T, H, W, 3), or T arrays (H, W, 3) of equal size

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
SNAP = 3  # pixels; a crop size that differs from the input size by less becomes the input size


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def multi_scale_sizes(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The ten candidate (width, height) of the multi-scale crop.

    Both are fractions of the short side, at most one step of `MULTI_SCALES` apart.
    """
    sides = [int(min(height, width) * scale) for scale in MULTI_SCALES]
    sides = [size if abs(side - size) < SNAP else side for side in sides]
    steps = range(len(sides))
    return [(sides[j], sides[i]) for i in steps for j in steps if abs(i - j) <= 1]


def multi_scale_offsets(height: int, width: int, crop_height: int, crop_width: int) -> list[tuple[int, int]]:
    """The thirteen candidate (left, top) of the multi-scale crop: corners, centre, edge middles and quarters."""
    x, y = (width - crop_width) // 4, (height - crop_height) // 4
    corners = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    middles = [(0, 2), (4, 2), (2, 4), (2, 0)]
    quarters = [(1, 1), (3, 1), (1, 3), (3, 3)]
    return [(across * x, down * y) for across, down in corners + middles + quarters]


def multi_scale_box(height: int, width: int, size: int, rng: np.random.Generator) -> Box:
    """Draw a multi-scale crop of an image for an input of size x size pixels (pre-training; QUIRKS 31)."""
    sizes = multi_scale_sizes(height, width, size)
    crop_width, crop_height = sizes[rng.integers(len(sizes))]
    offsets = multi_scale_offsets(height, width, crop_height, crop_width)
    left, top = offsets[rng.integers(len(offsets))]
    return Box(top, left, crop_height, crop_width)


def random_resized_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a crop whose area fraction is in `scale` and whose aspect ratio (width / height) is in `ratio`.

    If ten draws do not fit, return the largest central crop with an aspect ratio in `ratio`, as torchvision does.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def cut(frames: Frames, box: Box) -> Frames:
    """Crop each frame: (T, H, W, 3) -> (T, box.height, box.width, 3); without a copy, if the box is inside.

    Outside of the frame is black, as in Pillow: a multi-scale crop may be up to two pixels larger than the frame.
    """
    if isinstance(frames, np.ndarray):
        return _cut(frames, box)
    return [_cut(frame, box) for frame in frames]


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """(..., H, W, 3) -> (..., box.height, box.width, 3)."""
    height, width = pixels.shape[-3:-1]
    above, below = max(0, -box.top), max(0, box.top + box.height - height)
    left, right = max(0, -box.left), max(0, box.left + box.width - width)
    if above or below or left or right:
        outside = [(0, 0)] * (pixels.ndim - 3)
        pixels = np.pad(pixels, [*outside, (above, below), (left, right), (0, 0)])
    top, start = box.top + above, box.left + left
    return pixels[..., top : top + box.height, start : start + box.width, :]


def resize_bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize with antialiasing (Pillow): uint8 (H, W, 3) -> (size, size, 3)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_smoothly(frames: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize with antialiasing to (T, size, size, 3), as Pillow.

    PyTorch's kernel is five times as fast as Pillow's. A few percent of the pixels differ from it, by one level of
    255 or rarely two, because the two round halves differently.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()


def resize_bilinear(frames: Frames, size: int) -> np.ndarray:
    """Bilinear resize without antialiasing to (T, size, size, 3) (QUIRKS 9).

    The official release interpolates normalised floats; the result here is rounded to uint8, so it differs by at most
    half a level of 255.
    """
    resized = np.empty((len(frames), size, size, 3), np.uint8)
    for target, frame in zip(resized, frames, strict=True):
        cv2.convertScaleAbs(cv2.resize(frame.astype(np.float32), (size, size)), dst=target)
    return resized


def mirror(frames: np.ndarray) -> np.ndarray:
    """Flip horizontally."""
    return np.stack([cv2.flip(frame, 1) for frame in frames])


def channels_first(frames: Frames, planes: np.ndarray) -> None:
    """Copy uint8 frames (T, H, W, 3) to planes (3, T, H, W); eight times as fast as numpy's transpose."""
    for number, frame in enumerate(frames):
        cv2.split(frame, list(planes[:, number]))


def to_clip(frames: Frames) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> uint8 tensor (3, T, H, W)."""
    planes = np.empty((3, len(frames), *frames[0].shape[:2]), np.uint8)
    channels_first(frames, planes)
    return torch.from_numpy(planes)


def erase_box(size: int, probability: float, rng: np.random.Generator) -> Box:
    """Draw the box of random erasing in a size x size clip; an empty box with probability 1 - `probability`.

    2 % to a third of the area, height / width between 0.3 and 1/0.3, ten attempts (timm's RandomErasing).
    """
    if rng.random() < probability:
        for _ in range(10):
            area = size * size * rng.uniform(0.02, 1 / 3)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < size and width < size:
                top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
                return Box(int(top), int(left), height, width)
    return Box(0, 0, 0, 0)
