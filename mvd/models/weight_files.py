"""Reads weight files from untrusted sources: loading runs no code, and an unreadable file gives a clear error."""

import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mvd.files import DISK_FAULTS
from mvd.models.safe_types import safe_types
from mvd.weight_keys import CheckpointError, Tensors, unwrap
from mvd.weight_shapes import is_safetensors


def read_weights(path: Path) -> Tensors:
    """The state dict of a .safetensors file, or of a pickle of tensors, plain containers and known settings.

    Official files are such pickles: besides the weights they contain their arguments and their optimizer's learning
    rates. These are skipped (mvd.models.safe_types); a pickle with any other class is refused before it is executed.

    Raises:
        CheckpointError: the file does not exist, is damaged or unsafe, or has no weights.
        OSError: the disk, or missing permission.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}; give an existing .pth or .safetensors file")
    try:
        if is_safetensors(path):
            return unwrap(safetensors.torch.load_file(path), Tensor, str(path))
        with torch.serialization.safe_globals(safe_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return unwrap(content, Tensor, str(path))
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # malicious or damaged files can cause any exception
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            objects = f"a {found[1]}" if found else "objects other than tensors and settings"
            raise CheckpointError(
                f"{path} is not a plain checkpoint: it contains {objects}, which could run code when loaded, or it is "
                "no checkpoint; if you trust its source, convert it to .safetensors"
            ) from error
        raise CheckpointError(f"{path} is damaged or not a checkpoint; download or write it again") from error
