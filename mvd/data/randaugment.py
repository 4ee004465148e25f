"""RandAugment for clips: timm draws the operations, numpy and OpenCV apply them to a clip as one array.

Only the region is computed that the later crop reads: `regions` carries its box backwards through the operations.
Against Pillow, which timm uses: operations on levels and sharpening are equal; shears and translations differ by one
level in at most two pixels of a hundred; rotation uses OpenCV's softer bicubic kernel (a = -0.75, Pillow's is -1) and
does not round down, 0.4 levels on average.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform

from mvd.config import ConfigError
from mvd.data.augment import Box, cut

FILL = (128, 128, 128)
LEVELS = np.arange(256)
Size = tuple[int, int]  # height and width of a frame


class Operation(NamedTuple):
    """One drawn operation, by the name of timm's function, with its argument where it has one."""

    name: str
    argument: float = 0.0


def rand_augment_policy(policy: str) -> RandAugment:
    """timm's RandAugment of that description, with the official fill and interpolation."""
    return rand_augment_transform(policy, {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC})


@cache
def _recorder(policy: str) -> RandAugment:
    """The same policy, but for a list in place of an image: each operation appends itself with its argument."""
    recorder = rand_augment_policy(policy)
    for op in recorder.ops:
        name = op.aug_fn.__name__
        if name not in OPERATIONS:
            raise ConfigError(f"augmentation.auto={policy}: {name} is not available for clips; choose another policy")
        op.aug_fn = partial(_record, name)
    return recorder


def _record(name: str, drawn: list[Operation], *arguments: float, **_: object) -> list[Operation]:
    return [*drawn, Operation(name, *arguments)]


def draw_operations(policy: str, rng: np.random.Generator) -> list[Operation]:
    """Draws the operations of a clip and their arguments, as timm does for an image.

    timm draws from the global generators; they are set to one drawn seed and put back afterwards.
    """
    seed = int(rng.integers(2**32))
    with _global_generators_kept():
        random.seed(seed)
        np.random.seed(seed)
        return _recorder(policy)([])


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)


def apply_operations(frames: np.ndarray, operations: Sequence[Operation], box: Box) -> np.ndarray:
    """A box of the frames, uint8 (T, H, W, 3), after the operations: uint8 (T, box.height, box.width, 3)."""
    size: Size = frames.shape[1:3]
    region, *following = regions(operations, box, size)
    clip = cut(frames, region)
    for operation, after in zip(operations, following, strict=True):
        clip = OPERATIONS[operation.name].apply(clip, operation.argument, region, after, size)
        region = after
    return clip


def regions(operations: Sequence[Operation], box: Box, size: Size) -> list[Box]:
    """The part of a frame that is needed before each operation, and at last the box itself."""
    needed = [box]
    for operation in reversed(operations):
        needed.append(OPERATIONS[operation.name].needs(needed[-1], operation.argument, size))
    return needed[::-1]


def _inside(box: Box, region: Box) -> Box:
    """A box of a frame, as it lies within a region that holds it."""
    return box._replace(top=box.top - region.top, left=box.left - region.left)


class Applied(NamedTuple):
    """How one operation works on clips.

    needs(after, argument, size) is the region of a frame that it reads to make the region `after`. apply(clip,
    argument, before, after, size) makes that region from a clip of the region `before`.
    """

    needs: Callable[[Box, float, Size], Box]
    apply: Callable[[np.ndarray, float, Box, Box, Size], np.ndarray]


# One table for all frames and channels: level -> level.


def _from_table(table: Callable[[float], np.ndarray]) -> Applied:
    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        levels = table(argument).astype(np.uint8)
        return np.stack([cv2.LUT(frame, levels) for frame in clip])

    return Applied(lambda after, argument, size: after, apply)


def _invert(_: float) -> np.ndarray:
    return 255 - LEVELS


def _posterize(bits: float) -> np.ndarray:
    return LEVELS & ~(2 ** max(8 - int(bits), 0) - 1)


def _solarize(threshold: float) -> np.ndarray:
    return np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)


def _solarize_add(addend: float) -> np.ndarray:
    return np.where(LEVELS < 128, np.minimum(LEVELS + int(addend), 255), LEVELS)


def _brightness(factor: float) -> np.ndarray:
    return blend(np.zeros(256), LEVELS, factor)


def blend(base: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's: base + factor x (pixels - base) in single precision, clipped and rounded down to uint8."""
    mixed = np.subtract(pixels, base, dtype=np.float32)
    mixed *= np.float32(factor)
    mixed += base
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


# A table for each frame and channel, made from the whole frame.


def _from_statistics(tables: Callable[[np.ndarray, float], np.ndarray]) -> Applied:
    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        levels = np.ascontiguousarray(tables(clip, argument)).astype(np.uint8)[:, None]  # (T, 1, 256, 3)
        return np.stack([cv2.LUT(frame, table) for frame, table in zip(cut(clip, after), levels, strict=True)])

    return Applied(lambda after, argument, size: Box(0, 0, *size), apply)


def _autocontrast(clip: np.ndarray, _: float) -> np.ndarray:
    frames, height, width = clip.shape[:3]
    rows = clip.reshape(frames, height, width * 3)  # the long axis last: numpy is quick at that
    low = rows.min(axis=1).reshape(frames, width, 3).min(axis=1).astype(float)[:, None]
    high = rows.max(axis=1).reshape(frames, width, 3).max(axis=1).astype(float)[:, None]
    flat = high <= low
    scale = 255.0 / np.where(flat, 1, high - low)
    stretched = np.clip(np.trunc(LEVELS[:, None] * scale - low * scale), 0, 255)
    return np.where(flat, LEVELS[:, None], stretched)


def _equalize(clip: np.ndarray, _: float) -> np.ndarray:
    counts = np.array([[_histogram(frame, channel) for channel in range(3)] for frame in clip])
    last = counts.shape[-1] - 1 - np.argmax(counts[..., ::-1] > 0, axis=-1)[..., None]
    step = (counts.sum(axis=-1, keepdims=True) - np.take_along_axis(counts, last, axis=-1)) // 255
    below = np.cumsum(counts, axis=-1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return np.where(step > 0, spread, LEVELS).transpose(0, 2, 1)


def _histogram(frame: np.ndarray, channel: int) -> np.ndarray:
    return cv2.calcHist([frame], [channel], None, [256], [0, 256]).ravel().astype(np.int64)


def _contrast(clip: np.ndarray, factor: float) -> np.ndarray:
    means = np.array([int(luma(frame).mean() + 0.5) for frame in clip])
    return np.repeat(blend(means[:, None], LEVELS, factor)[..., None], 3, axis=-1)


def luma(frame: np.ndarray) -> np.ndarray:
    """Pillow's "L" of an RGB frame: uint8 (H, W, 3) -> uint8 (H, W). Single precision holds its integers exactly."""
    weights = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


# Pixels mixed with a base that is made from themselves or their neighbours.


def _color(clip: np.ndarray, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    return np.stack([blend(luma(frame)[..., None], frame, factor) for frame in clip])


def _sharpness(clip: np.ndarray, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    kernel = np.full((3, 3), 1 / 13, np.float32)
    kernel[1, 1] = 5 / 13
    sharpened = np.empty((len(clip), after.height, after.width, 3), np.uint8)
    for target, frame in zip(sharpened, clip, strict=True):
        smooth = cv2.filter2D(frame, -1, kernel)
        _keep_frame_border(smooth, frame, before, size)
        target[:] = cut(blend(smooth, frame, factor)[None], _inside(after, before))[0]
    return sharpened


def _keep_frame_border(smooth: np.ndarray, pixels: np.ndarray, region: Box, size: Size) -> None:
    """Puts back the outermost pixels of the frame, which Pillow does not smooth, where the region holds them."""
    rows = [row for row in (0, size[0] - 1) if region.top <= row < region.top + region.height]
    columns = [column for column in (0, size[1] - 1) if region.left <= column < region.left + region.width]
    for row in rows:
        smooth[row - region.top] = pixels[row - region.top]
    for column in columns:
        smooth[:, column - region.left] = pixels[:, column - region.left]


def _grown(box: Box, margin: int, size: Size) -> Box:
    """The box with a margin, as far as the frame goes; one pixel of the frame where the box lies outside."""
    top, left = (min(max(start - margin, 0), side - 1) for start, side in zip(box[:2], size, strict=True))
    bottom = min(max(box.top + box.height + margin, top + 1), size[0])
    right = min(max(box.left + box.width + margin, left + 1), size[1])
    return Box(top, left, bottom - top, right - left)


# Rows, or columns, moved along themselves, each by its own distance in pixels.


def _along_rows(distance: Callable[[float, int, int], float]) -> Applied:
    """`distance(argument, row, length)`: how far to the right of itself a row of that length looks for its pixels."""

    def needs(after: Box, argument: float, size: Size) -> Box:
        ends = [distance(argument, row, size[1]) for row in (after.top, after.top + after.height - 1)]
        left = after.left + math.floor(min(ends))
        right = after.left + after.width + math.ceil(max(ends))
        columns = _grown(Box(after.top, left, after.height, right - left), 2, size)
        return columns._replace(top=after.top, height=after.height)

    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        padded = np.stack([cv2.copyMakeBorder(frame, 0, 0, 2, 2, cv2.BORDER_REPLICATE) for frame in clip])
        moved = np.full((len(clip), after.height, after.width, 3), FILL, np.uint8)
        rows = [distance(argument, row, size[1]) for row in range(after.top, after.top + after.height)]
        start = 0
        for shift, run in groupby(rows):
            block = slice(start, start := start + len(list(run)))
            whole = math.floor(shift)
            first = max(after.left, math.ceil(-0.5 - shift))
            end = min(after.left + after.width, math.ceil(size[1] - 0.5 - shift))
            if first < end:
                offset = whole - before.left + 2
                seen = padded[:, block, first + offset - 1 : end + offset + 2]
                pixels = _interpolate(seen.reshape(-1, *seen.shape[2:]), shift - whole)[:, 1 : 1 + end - first]
                moved[:, block, first - after.left : end - after.left] = pixels.reshape(len(clip), -1, end - first, 3)
        return moved

    return Applied(needs, apply)


def _interpolate(rows: np.ndarray, d: float) -> np.ndarray:
    """Rows seen a fraction d of a pixel further right, by Pillow's bicubic kernel, which it rounds down from."""
    kernel = [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) * (1 - d)]
    almost_half_a_level = 0.5 - 2**-12  # so that rounding to the nearest rounds down, but not from a whole level
    kernel = np.array([kernel], np.float32)
    border = cv2.BORDER_REPLICATE
    return cv2.filter2D(rows, -1, kernel, anchor=(1, 0), delta=-almost_half_a_level, borderType=border)


def _along_columns(distance: Callable[[float, int, int], float]) -> Applied:
    of_rows = _along_rows(distance)

    def needs(after: Box, argument: float, size: Size) -> Box:
        return _turned(of_rows.needs(_turned(after), argument, size[::-1]))

    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        columns = np.stack([cv2.transpose(frame) for frame in clip])
        moved = of_rows.apply(columns, argument, _turned(before), _turned(after), size[::-1])
        return np.stack([cv2.transpose(frame) for frame in moved])

    return Applied(needs, apply)


def _turned(box: Box) -> Box:
    return Box(box.left, box.top, box.width, box.height)


def _shear(factor: float, row: int, _: int) -> float:
    return factor * (row + 0.5)


def _translate(share: float, _: int, length: int) -> float:
    return share * length


def _rotation(degrees: float, size: Size) -> np.ndarray:
    """From a place in the rotated frame to the place it shows, (x, y, 1) -> (x, y), in pixels from the corner."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = size[0] / 2, size[1] / 2
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _rotate_needs(after: Box, degrees: float, size: Size) -> Box:
    across, down = (after.left, after.left + after.width), (after.top, after.top + after.height)
    corners = np.array([[x, y, 1] for x in across for y in down]) @ _rotation(degrees, size).T
    left, top = np.floor(corners.min(axis=0)).astype(int).tolist()
    right, bottom = np.ceil(corners.max(axis=0)).astype(int).tolist()
    return _grown(Box(top, left, bottom - top, right - left), 3, size)


def _rotate(clip: np.ndarray, degrees: float, before: Box, after: Box, size: Size) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(after.width) + after.left + 0.5, np.arange(after.height) + after.top + 0.5)
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ _rotation(degrees, size).T
    outside = ((places < 0) | (places >= size[::-1])).any(axis=-1)
    # OpenCV counts from the middle of the first pixel, in 32nds of a pixel: the same ones for any region.
    places = np.rint((places - 0.5) * 32) / 32 - [before.left, before.top]
    maps = cv2.convertMaps(places.astype(np.float32), None, cv2.CV_16SC2)
    rotated = [cv2.remap(frame, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE) for frame in clip]
    for frame in rotated:
        frame[outside] = FILL
    return np.stack(rotated)


OPERATIONS: dict[str, Applied] = {
    "auto_contrast": _from_statistics(_autocontrast),
    "equalize": _from_statistics(_equalize),
    "contrast": _from_statistics(_contrast),
    "invert": _from_table(_invert),
    "posterize": _from_table(_posterize),
    "solarize": _from_table(_solarize),
    "solarize_add": _from_table(_solarize_add),
    "brightness": _from_table(_brightness),
    "color": Applied(lambda after, argument, size: after, _color),
    "sharpness": Applied(lambda after, argument, size: _grown(after, 1, size), _sharpness),
    "shear_x": _along_rows(_shear),
    "shear_y": _along_columns(_shear),
    "translate_x_rel": _along_rows(_translate),
    "translate_y_rel": _along_columns(_translate),
    "rotate": Applied(_rotate_needs, _rotate),
}
