"""Reads weight files from untrusted sources: loading runs no code, and an unreadable file gives a clear error."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mvd.config import ConfigError
from mvd.models.safe_types import safe_types

# Keys under which official files have the state dict; it depends on the program that wrote them.
NESTING = ("model", "module")


class CheckpointError(ConfigError):
    """Weights that cannot be used; one sentence: what is wrong, where, and how to fix it."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a pickle of tensors, plain containers and argparse.Namespace.

    Official files are such pickles: besides the weights they contain their arguments, a Namespace. A pickle with any
    other class is refused before it is executed.

    Raises:
        CheckpointError: the file does not exist, is damaged or unsafe, or has no weights.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}; give an existing .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(safe_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return find_state_dict(content, str(path))
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # malicious or damaged files can cause any exception
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise CheckpointError(
                f"{path} is not a plain checkpoint: it contains objects other than tensors and settings, which could "
                "run code when loaded, or it is no checkpoint; if you trust its source, convert it to .safetensors"
            ) from error
        raise CheckpointError(f"{path} is damaged or not a checkpoint; download or write it again") from error


def find_state_dict(content: Any, origin: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content, which may be nested; `origin` is its name in errors.

    Raises:
        CheckpointError: there are no tensors.
    """
    for entry in NESTING:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{origin} holds no weights, neither directly nor under {' or '.join(NESTING)}; give a state dict"
        )
    return tensors
