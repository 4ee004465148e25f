"""RandAugment's color operations on a clip as one array; the results equal Pillow's exactly."""

from collections.abc import Callable

import cv2
import numpy as np

from mvd.data.clip.crops import Box, Frames, cut
from mvd.data.randaugment.regions import Applied, Size, each_frame, grown, inside

LEVELS = np.arange(256)


# Operations that are one lookup table for all frames and channels.


def _from_table(table: Callable[[float], np.ndarray]) -> Applied:
    def apply(clip: Frames, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        levels = table(argument).astype(np.uint8)
        return each_frame(clip, after, lambda frame, target: cv2.LUT(frame, levels, dst=target))

    return Applied(lambda after, argument, size: after, apply)


def _invert(_: float) -> np.ndarray:
    return 255 - LEVELS


def _posterize(bits: float) -> np.ndarray:
    lost: int = 2 ** max(8 - int(bits), 0) - 1
    return LEVELS & ~lost


def _solarize(threshold: float) -> np.ndarray:
    return np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)


def _solarize_add(addend: float) -> np.ndarray:
    return np.where(LEVELS < 128, np.minimum(LEVELS + int(addend), 255), LEVELS)


def _brightness(factor: float) -> np.ndarray:
    return blend(np.zeros(256), LEVELS, factor)


def blend(base: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's blend: base + factor x (pixels - base) in float32, clipped and rounded down to uint8."""
    base, pixels = base.astype(np.float32), pixels.astype(np.float32)  # numpy is slow with operands of two types
    mixed = pixels - base
    mixed *= np.float32(factor)
    mixed += base
    clipped: np.ndarray = np.clip(mixed, 0, 255, out=mixed)
    return clipped.astype(np.uint8)


# Operations with a lookup table per frame, and channel where they differ, computed from the whole frame.


def _from_statistics(tables: Callable[[Frames, float], np.ndarray]) -> Applied:
    def apply(clip: Frames, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        levels = np.ascontiguousarray(tables(clip, argument)).astype(np.uint8)[:, None]  # (T, 1, 256, 3 or 1)
        mapped = np.empty((len(clip), after.height, after.width, 3), np.uint8)
        for target, frame, table in zip(mapped, cut(clip, after), levels, strict=True):
            cv2.LUT(frame, table, dst=target)
        return mapped

    return Applied(lambda after, argument, size: Box(0, 0, *size), apply)


def _autocontrast(clip: Frames, _: float) -> np.ndarray:
    rows = [frame.reshape(len(frame), -1) for frame in clip]  # numpy reduces fast with the long axis last
    low = np.stack([row.min(axis=0).reshape(-1, 3).min(axis=0) for row in rows]).astype(float)[:, None]
    high = np.stack([row.max(axis=0).reshape(-1, 3).max(axis=0) for row in rows]).astype(float)[:, None]
    flat = high <= low
    scale = 255.0 / np.where(flat, 1, high - low)
    stretched = np.clip(np.trunc(LEVELS[:, None] * scale - low * scale), 0, 255)
    return np.where(flat, LEVELS[:, None], stretched)


def _equalize(clip: Frames, _: float) -> np.ndarray:
    counts = np.array([[_histogram(frame, channel) for channel in range(3)] for frame in clip])
    last = counts.shape[-1] - 1 - np.argmax(counts[..., ::-1] > 0, axis=-1)[..., None]
    step = (counts.sum(axis=-1, keepdims=True) - np.take_along_axis(counts, last, axis=-1)) // 255
    below = np.cumsum(counts, axis=-1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return np.where(step > 0, spread, LEVELS).transpose(0, 2, 1)


def _histogram(frame: np.ndarray, channel: int) -> np.ndarray:
    return cv2.calcHist([frame], [channel], None, [256], [0, 256]).ravel().astype(np.int64)


def _contrast(clip: Frames, factor: float) -> np.ndarray:
    pixels = clip[0].shape[0] * clip[0].shape[1]
    means = np.array([int(cv2.sumElems(luma(frame))[0] / pixels + 0.5) for frame in clip])
    return blend(means[:, None, None], LEVELS[:, None], factor)


def luma(frame: np.ndarray) -> np.ndarray:
    """Pillow's "L" of an RGB frame: uint8 (H, W, 3) -> uint8 (H, W). float32 holds its integers exactly."""
    weights = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


# Operations that blend pixels with a base computed from the same or the neighbouring pixels.


def _color(clip: Frames, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    def recolour(frame: np.ndarray, target: np.ndarray) -> None:
        grey = cv2.cvtColor(luma(frame), cv2.COLOR_GRAY2RGB)  # faster than broadcasting in numpy
        target[:] = blend(grey, frame, factor)

    return each_frame(clip, after, recolour)


def _sharpness(clip: Frames, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    inner = inside(after, before)
    rows, columns = slice(inner.top, inner.top + inner.height), slice(inner.left, inner.left + inner.width)

    def sharpen(frame: np.ndarray, target: np.ndarray) -> None:
        sums = cv2.boxFilter(frame, cv2.CV_16S, (3, 3), normalize=False)
        sums += 4 * frame.astype(np.int16)
        smooth = cv2.convertScaleAbs(sums, alpha=1 / 13)  # never half a level, so that rounding is exact
        _keep_frame_border(smooth, frame, before, size)
        target[:] = blend(smooth[rows, columns], frame[rows, columns], factor)

    return each_frame(clip, after, sharpen)


def _keep_frame_border(smooth: np.ndarray, pixels: np.ndarray, region: Box, size: Size) -> None:
    """Restore the frame's border pixels that are in the region: Pillow does not smooth them."""
    rows = [row for row in (0, size[0] - 1) if region.top <= row < region.top + region.height]
    columns = [column for column in (0, size[1] - 1) if region.left <= column < region.left + region.width]
    for row in rows:
        smooth[row - region.top] = pixels[row - region.top]
    for column in columns:
        smooth[:, column - region.left] = pixels[:, column - region.left]


OPERATIONS = {
    "auto_contrast": _from_statistics(_autocontrast),
    "equalize": _from_statistics(_equalize),
    "contrast": _from_statistics(_contrast),
    "invert": _from_table(_invert),
    "posterize": _from_table(_posterize),
    "solarize": _from_table(_solarize),
    "solarize_add": _from_table(_solarize_add),
    "brightness": _from_table(_brightness),
    "color": Applied(lambda after, argument, size: after, _color),
    "sharpness": Applied(lambda after, argument, size: grown(after, 1, size), _sharpness),
}
