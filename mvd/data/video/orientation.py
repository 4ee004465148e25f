"""Turns pictures as the display matrix of their container tells players to."""

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
from av.sidedata.sidedata import SideData, SideDataContainer
from av.video.frame import VideoFrame

TOLERANCE = 0.01  # of the largest coefficient: what rounding may leave of a zero


class Orientation(NamedTuple):
    """One of the eight ways to turn and mirror a picture; transposed first, then mirrored."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of a picture (H, W, C) as it is shown: (H, W, C) or (W, H, C)."""
        turned = pixels.swapaxes(0, 1) if self.transposed else pixels
        return turned[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height of a decoded frame as it is shown."""
        return (frame.height, frame.width) if self.transposed else (frame.width, frame.height)


AS_STORED = Orientation()


def orientation_of(frame: VideoFrame) -> Orientation:
    """How a decoded frame is shown.

    Raises:
        ValueError: turned by an angle that is no multiple of 90 degrees, or sheared.
    """
    # frame.side_data would keep the container, and each the other: pictures stayed in memory until a full collection.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # missing in its hints
    return AS_STORED if matrix is None else _from_matrix(bytes(cast(SideData, matrix)))


@lru_cache
def _from_matrix(matrix: bytes) -> Orientation:
    """From 9 int32, a, b, -, c, d, ...: a pixel (x, y) is shown at (a x + c y, b x + d y), plus an offset."""
    a, b, _, c, d = np.frombuffer(matrix, np.int32).astype(float)[:5]
    zero = TOLERANCE * max(abs(a), abs(b), abs(c), abs(d))
    if abs(b) <= zero and abs(c) <= zero and abs(a) > zero and abs(d) > zero:
        return Orientation(False, bool(d < 0), bool(a < 0))
    if abs(a) <= zero and abs(d) <= zero and abs(b) > zero and abs(c) > zero:
        return Orientation(True, bool(b < 0), bool(c < 0))
    raise ValueError("its display matrix does more than turn by 90, 180 or 270 degrees and mirror")
