"""What a pickled checkpoint may hold beside tensors and plain containers: types whose reconstruction runs no code.

Training code often pickles its settings, its optimizer and its random states beside the weights: an
argparse.Namespace, learning rates that are NumPy scalars, paths. The official MVD, MAE and VideoMAE programs do.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def safe_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Types and functions for torch.serialization.safe_globals, under every module name that they have had."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    arrays: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [np.dtype, np.ndarray]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2 and NumPy 1
        arrays += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    dtypes = [type(np.dtype(name)) for name in (*NUMBERS, "bool")]
    paths: list[tuple[Callable[..., Any], str]] = []
    for module in ("pathlib", "pathlib._local"):  # Python up to 3.12, and 3.13
        paths += [(pathlib.PurePosixPath, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath")]
        paths += [(pathlib.PureWindowsPath, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    return [argparse.Namespace, *arrays, *dtypes, *paths]
