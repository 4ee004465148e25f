"""RandAugment's geometric operations on a clip as one array.

Shears and translations shift rows or columns with Pillow's bicubic kernel: at most 2 % of the pixels differ from
Pillow's, by one level. Rotation uses OpenCV's bicubic kernel, which is softer (a = -0.75; Pillow's is -1) and rounds
to nearest instead of down: it differs by 0.4 levels on average.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np

from mvd.data.clip.crops import Box, Frames
from mvd.data.randaugment.regions import Applied, Size, each_frame, grown, turned

FILL = 128  # level of pixels from outside the frame, in each channel, as in the official release


def _across_needs(after: Box, ends: Sequence[float], size: Size) -> Box:
    """The region whose columns are read if those of `after` are read so far to the right of where they are."""
    left = after.left + math.floor(min(ends))
    right = after.left + after.width + math.ceil(max(ends))
    columns = grown(Box(after.top, left, after.height, right - left), 2, size)
    return columns._replace(top=after.top, height=after.height)


def _filled(after: Box, width: int, shift: float) -> tuple[int, int]:
    """The columns of `after`, from the first to before the last, that are read from inside a frame of this width."""
    first = max(after.left, math.ceil(-0.5 - shift))
    return first, max(first, min(after.left + after.width, math.ceil(width - 0.5 - shift)))


def _interpolate(pixels: np.ndarray, d: float, down: bool = False) -> np.ndarray:
    """Shift pixels left, or up, by a fraction d of a pixel with Pillow's bicubic kernel, rounding down as Pillow."""
    taps = [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) * (1 - d)]
    kernel = np.array([taps], np.float32)
    almost_half_a_level = 0.5 - 2**-12  # turns OpenCV's rounding to nearest into rounding down, except at integers
    kernel, anchor = (kernel.T, (0, 1)) if down else (kernel, (1, 0))
    border = cv2.BORDER_REPLICATE
    return cv2.filter2D(pixels, -1, kernel, anchor=anchor, delta=-almost_half_a_level, borderType=border)


def _shear_rows(clip: Frames, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    padded = each_frame(
        clip,
        before._replace(width=before.width + 4),
        lambda frame, target: cv2.copyMakeBorder(frame, 0, 0, 2, 2, cv2.BORDER_REPLICATE, dst=target),
    )
    moved = np.full((len(clip), after.height, after.width, 3), FILL, np.uint8)
    for row in range(after.height):
        shift = factor * (after.top + row + 0.5)
        first, end = _filled(after, size[1], shift)
        if first < end:
            whole = math.floor(shift)
            offset = whole - before.left + 2
            seen = padded[:, row, first + offset - 1 : end + offset + 2]
            pixels = _interpolate(seen, shift - whole)[:, 1 : 1 + end - first]
            moved[:, row, first - after.left : end - after.left] = pixels
    return moved


def _shear_columns(clip: Frames, factor: float, before: Box, after: Box, size: Size) -> np.ndarray:
    columns = each_frame(clip, turned(before), cv2.transpose)
    moved = _shear_rows(columns, factor, turned(before), turned(after), size[::-1])
    return each_frame(moved, after, cv2.transpose)


def _translate(clip: Frames, share: float, before: Box, after: Box, size: Size, down: bool) -> np.ndarray:
    along, across = (turned(after), turned(before)) if down else (after, before)
    length = size[0] if down else size[1]
    shift = share * length
    whole = math.floor(shift)
    first, end = _filled(along, length, shift)
    made = slice(first - along.left, end - along.left)
    start = max(first + whole - across.left - 1, 0)  # of the columns that are read; filled ones may begin outside
    skipped = first + whole - across.left - start
    seen = slice(start, end + whole - across.left + 2)

    def move(frame: np.ndarray, target: np.ndarray) -> None:
        target[:] = FILL
        read = frame[seen] if down else frame[:, seen]
        if skipped < 0:
            top, left = (-skipped, 0) if down else (0, -skipped)
            read = cv2.copyMakeBorder(read, top, 0, left, 0, cv2.BORDER_REPLICATE)
        pixels = _interpolate(read, shift - whole, down)
        chosen = slice(max(skipped, 0), max(skipped, 0) + end - first)
        if down:
            target[made] = pixels[chosen]
        else:
            target[:, made] = pixels[:, chosen]

    if first == end:
        return np.full((len(clip), after.height, after.width, 3), FILL, np.uint8)
    return each_frame(clip, after, move)


def _of_columns(needs: Callable[[Box, float, Size], Box]) -> Callable[[Box, float, Size], Box]:
    return lambda after, argument, size: turned(needs(turned(after), argument, size[::-1]))


def _shear_needs(after: Box, factor: float, size: Size) -> Box:
    rows = (after.top, after.top + after.height - 1)
    return _across_needs(after, [factor * (row + 0.5) for row in rows], size)


def _translate_needs(after: Box, share: float, size: Size) -> Box:
    return _across_needs(after, [share * size[1]], size)


def _rotated(degrees: float, x: np.ndarray, y: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Where a rotated frame reads the pixels at (x, y); in pixels from the frame's corner."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle_y, middle_x = size[0] / 2, size[1] / 2
    x, y = x - middle_x, y - middle_y
    return cos * x - sin * y + middle_x, sin * x + cos * y + middle_y


def _rotate_needs(after: Box, degrees: float, size: Size) -> Box:
    across = np.array([after.left, after.left + after.width])
    down = np.array([[after.top], [after.top + after.height]])
    x, y = _rotated(degrees, across, down, size)
    left, top = math.floor(x.min()), math.floor(y.min())
    return grown(Box(top, left, math.ceil(y.max()) - top, math.ceil(x.max()) - left), 3, size)


def _rotate(clip: Frames, degrees: float, before: Box, after: Box, size: Size) -> np.ndarray:
    across = np.arange(after.left, after.left + after.width) + 0.5
    down = np.arange(after.top, after.top + after.height)[:, None] + 0.5
    x, y = _rotated(degrees, across, down, size)
    outside = ((x < 0) | (x >= size[1]) | (y < 0) | (y >= size[0])).astype(np.uint8)
    # OpenCV counts from the centre of the first pixel and rounds to 1/32 pixel. Rounding before the region's start is
    # subtracted gives every region the same pixels.
    x, y = (
        (np.rint((places - 0.5) * 32) / 32 - start).astype(np.float32)
        for places, start in ((x, before.left), (y, before.top))
    )
    maps = cv2.convertMaps(x, y, cv2.CV_16SC2)
    filling = np.full((after.height, after.width, 3), FILL, np.uint8)

    def rotate(frame: np.ndarray, target: np.ndarray) -> None:
        cv2.remap(frame, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE, dst=target)
        cv2.copyTo(filling, outside, target)

    return each_frame(clip, after, rotate)


OPERATIONS = {
    "shear_x": Applied(_shear_needs, _shear_rows),
    "shear_y": Applied(_of_columns(_shear_needs), _shear_columns),
    "translate_x_rel": Applied(_translate_needs, partial(_translate, down=False)),
    "translate_y_rel": Applied(_of_columns(_translate_needs), partial(_translate, down=True)),
    "rotate": Applied(_rotate_needs, _rotate),
}
