"""Reads the pickles of a checkpoint without running code that somebody may have put into them.

Run directories are shared, and unpickling can call any function. Here it gives tensors, plain values and the classes
that a checkpoint is made of, and nothing else.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mvd.config import ConfigError

# Of DeepSpeed's optimizer states, and of NumPy's random state.
CLASSES = [
    LossScaler,
    ZeroStageEnum,
    fragment_address,
    np.zeros(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


def load_pickle(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """torch.load of a checkpoint's file; map_location and mmap as there.

    Raises:
        ConfigError: the file holds something that no checkpoint does.
    """
    try:
        with safe_globals(CLASSES):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(refusal(path)) from error


def is_safe(path: Path) -> bool:
    """Whether `load_pickle` would take a file, judged by the classes and functions it names; reads no tensors."""
    try:
        with safe_globals(CLASSES):
            return not get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # not in torch.save's format
        return False


def refusal(path: Path) -> str:
    """One sentence on a file that is not safe to load."""
    return (
        f"{path} holds code or objects that no checkpoint of this project does, so it was not loaded; find out who "
        f"wrote it, and remove {path.parent} to go on from the checkpoint before"
    )
