"""RandAugment's geometric operations on a clip as one array.

Shears and translations shift rows or columns with Pillow's bicubic kernel: at most 2 % of the pixels differ from
Pillow's, by one level. Rotation uses OpenCV's bicubic kernel, which is softer (a = -0.75; Pillow's is -1) and rounds
to nearest instead of down: it differs by 0.4 levels on average.
"""

import math
from collections.abc import Callable
from itertools import groupby

import cv2
import numpy as np

from mvd.data.clip.crops import Box
from mvd.data.randaugment.regions import Applied, Size, each_frame, grown, turned

FILL = 128  # level of pixels from outside the frame, in each channel, as in the official release


def _along_rows(distance: Callable[[float, int, int], float]) -> Applied:
    """Shift rows: `distance(argument, row, length)` is how far to the right a row of that length reads its pixels."""

    def needs(after: Box, argument: float, size: Size) -> Box:
        ends = [distance(argument, row, size[1]) for row in (after.top, after.top + after.height - 1)]
        left = after.left + math.floor(min(ends))
        right = after.left + after.width + math.ceil(max(ends))
        columns = grown(Box(after.top, left, after.height, right - left), 2, size)
        return columns._replace(top=after.top, height=after.height)

    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        padded = each_frame(
            clip,
            before._replace(width=before.width + 4),
            lambda frame, target: cv2.copyMakeBorder(frame, 0, 0, 2, 2, cv2.BORDER_REPLICATE, dst=target),
        )
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
    """Shift rows left by a fraction d of a pixel with Pillow's bicubic kernel, rounding down as Pillow."""
    taps = [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) * (1 - d)]
    kernel = np.array([taps], np.float32)
    almost_half_a_level = 0.5 - 2**-12  # turns OpenCV's rounding to nearest into rounding down, except at integers
    border = cv2.BORDER_REPLICATE
    return cv2.filter2D(rows, -1, kernel, anchor=(1, 0), delta=-almost_half_a_level, borderType=border)


def _along_columns(distance: Callable[[float, int, int], float]) -> Applied:
    of_rows = _along_rows(distance)

    def needs(after: Box, argument: float, size: Size) -> Box:
        return turned(of_rows.needs(turned(after), argument, size[::-1]))

    def apply(clip: np.ndarray, argument: float, before: Box, after: Box, size: Size) -> np.ndarray:
        columns = each_frame(clip, turned(before), cv2.transpose)
        moved = of_rows.apply(columns, argument, turned(before), turned(after), size[::-1])
        return each_frame(moved, after, cv2.transpose)

    return Applied(needs, apply)


def _shear(factor: float, row: int, _: int) -> float:
    return factor * (row + 0.5)


def _translate(share: float, _: int, length: int) -> float:
    return share * length


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


def _rotate(clip: np.ndarray, degrees: float, before: Box, after: Box, size: Size) -> np.ndarray:
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
    "shear_x": _along_rows(_shear),
    "shear_y": _along_columns(_shear),
    "translate_x_rel": _along_rows(_translate),
    "translate_y_rel": _along_columns(_translate),
    "rotate": Applied(_rotate_needs, _rotate),
}
