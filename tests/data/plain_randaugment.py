"""RandAugment's operations on whole frames, written plainly: what the fast ones must equal bit for bit.

Colour operations are Pillow's own. Pillow moves pixels with another rounding, so the geometric ones are written out.
"""

import math

import cv2
import numpy as np
from PIL import Image
from timm.data import auto_augment

from mvd.data.randaugment.policy import Operation

FILL = 128
OF_ROWS = {  # how far to the right a row of this length reads its pixels
    "shear_x": lambda factor, row, length: factor * (row + 0.5),
    "translate_x_rel": lambda share, row, length: share * length,
}
OF_COLUMNS = {"shear_y": "shear_x", "translate_y_rel": "translate_x_rel"}
WITHOUT_ARGUMENT = ("auto_contrast", "equalize", "invert")


def apply_plainly(frame: np.ndarray, name: str, argument: float) -> np.ndarray:
    """One operation on a whole frame, uint8 (H, W, 3)."""
    if name in OF_ROWS:
        return _move_rows(frame, [OF_ROWS[name](argument, row, frame.shape[1]) for row in range(len(frame))])
    if name in OF_COLUMNS:
        return apply_plainly(frame.swapaxes(0, 1), OF_COLUMNS[name], argument).swapaxes(0, 1)
    if name == "rotate":
        return _rotate(frame, argument)
    arguments = () if name in WITHOUT_ARGUMENT else (argument,)
    return np.asarray(getattr(auto_augment, name)(Image.fromarray(frame), *arguments))


def _move_rows(frame: np.ndarray, shifts: list[float]) -> np.ndarray:
    """Shifts each row to the left with Pillow's bicubic kernel, rounding down."""
    width = frame.shape[1]
    moved = np.full_like(frame, FILL)
    for row, shift in enumerate(shifts):
        whole, d = math.floor(shift), shift - math.floor(shift)
        taps = [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) * (1 - d)]
        kernel = np.array([taps], np.float32)
        read = np.clip(np.arange(-1, width + 2) + whole, 0, width - 1)
        line = np.ascontiguousarray(frame[row : row + 1, read])
        pixels = cv2.filter2D(line, -1, kernel, anchor=(1, 0), delta=-(0.5 - 2**-12), borderType=cv2.BORDER_REPLICATE)
        centres = np.arange(width) + 0.5 + shift
        inside = (centres >= 0) & (centres < width)
        moved[row, inside] = pixels[0, 1:-2][inside]
    return moved


def _rotate(frame: np.ndarray, degrees: float) -> np.ndarray:
    """With OpenCV's bicubic kernel, at positions rounded to 1/32 pixel."""
    height, width = frame.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y = x - width / 2, y - height / 2
    x, y = cos * x - sin * y + width / 2, sin * x + cos * y + height / 2
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    rounded = ((np.rint((places - 0.5) * 32) / 32).astype(np.float32) for places in (x, y))
    maps = cv2.convertMaps(*rounded, cv2.CV_16SC2)
    rotated = cv2.remap(frame, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    rotated[outside] = FILL
    return rotated


def draw_argument(name: str, magnitude: float, rng: np.random.Generator) -> Operation:
    """An operation at a magnitude from 0 to 10, with a random sign where it has one."""
    sign = rng.choice([-1.0, 1.0])
    arguments = {
        "posterize": max(4 - int(magnitude * 0.4), 1),
        "solarize": 256 - int(magnitude * 25.6),
        "solarize_add": int(magnitude * 11),
        "rotate": sign * magnitude * 3,
        "shear_x": sign * magnitude * 0.03,
        "shear_y": sign * magnitude * 0.03,
        "translate_x_rel": sign * magnitude * 0.045,
        "translate_y_rel": sign * magnitude * 0.045,
    }
    return Operation(name, 0.0 if name in WITHOUT_ARGUMENT else arguments.get(name, 1 + sign * magnitude * 0.09))
