"""Fixed position tables: computed in float64, returned as float32 of shape (1, tokens, width)."""

import torch
from torch import Tensor


def sincos_2d(width: int, side: int, *, class_token: bool = False) -> Tensor:
    """The image teacher's table over a square grid in (h, w) order (MAE).

    The first half of the channels encodes the column, the second half the row (QUIRKS 29). With `class_token`, a row
    of zeros comes first.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    _check_width(width, 4)
    table = _spatial(width, side)
    if class_token:
        table = torch.cat([torch.zeros(1, width), table])
    return table[None]


def sincos_3d(width: int, slices: int, side: int) -> Tensor:
    """The student's and the classifier's table over tokens in (t, h, w) order.

    A quarter of the channels encodes the temporal slice, the rest the place within the slice as in `sincos_2d`.

    Raises:
        ValueError: the width is not a multiple of 16.
    """
    _check_width(width, 16)
    temporal = _sines_then_cosines(width // 4, torch.arange(slices))
    spatial = _spatial(width * 3 // 4, side)
    table = torch.cat([temporal.repeat_interleave(side**2, dim=0), spatial.repeat(slices, 1)], dim=1)
    return table[None]


def sinusoid_1d(width: int, tokens: int) -> Tensor:
    """The video teacher's table over flattened tokens, as in VideoMAE: sines in even channels, cosines in odd ones."""
    channel = torch.arange(width)
    exponent = (channel - channel % 2).double() / width
    angle = torch.arange(tokens).double()[:, None] / 10000**exponent
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def _spatial(width: int, side: int) -> Tensor:
    code = _sines_then_cosines(width // 2, torch.arange(side))
    return torch.cat([code.repeat(side, 1), code.repeat_interleave(side, dim=0)], dim=1)


def _sines_then_cosines(width: int, positions: Tensor) -> Tensor:
    frequency = 10000 ** (-torch.arange(width // 2).double() / (width // 2))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def _check_width(width: int, unit: int) -> None:
    if width % unit:
        raise ValueError(f"the width of a sine-cosine position table must be a multiple of {unit}, got {width}")
