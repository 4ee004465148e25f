"""Regions of a frame, and the interface of RandAugment's operations on them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mvd.data.clip.crops import Box, Frames

Size = tuple[int, int]  # height and width of a frame


class Applied(NamedTuple):
    """One operation on clips.

    needs(after, argument, size): the region of a frame that it reads to compute the region `after`.
    apply(clip, argument, before, after, size): computes the region `after` from a clip of the region `before`.
    """

    needs: Callable[[Box, float, Size], Box]
    apply: Callable[[Frames, float, Box, Box, Size], np.ndarray]


def inside(box: Box, region: Box) -> Box:
    """The box in the coordinates of a region that contains it."""
    return box._replace(top=box.top - region.top, left=box.left - region.left)


def turned(box: Box) -> Box:
    """The box in the transposed frame."""
    return Box(box.left, box.top, box.width, box.height)


def grown(box: Box, margin: int, size: Size) -> Box:
    """The box with a margin, clipped to the frame; one pixel of the frame if the box is outside."""
    top, left = (min(max(start - margin, 0), side - 1) for start, side in zip(box[:2], size, strict=True))
    bottom = min(max(box.top + box.height + margin, top + 1), size[0])
    right = min(max(box.left + box.width + margin, left + 1), size[1])
    return Box(top, left, bottom - top, right - left)


def each_frame(clip: Frames, after: Box, work: Callable[[np.ndarray, np.ndarray], object]) -> np.ndarray:
    """A new clip of the region `after`; `work(frame, target)` fills each of its frames from the clip's."""
    made = np.empty((len(clip), after.height, after.width, 3), np.uint8)
    for frame, target in zip(clip, made, strict=True):
        work(frame, target)
    return made
