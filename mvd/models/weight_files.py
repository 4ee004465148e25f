"""Files with weights, from anywhere: what is read can run no code, and what cannot be read ends in one sentence."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mvd.config import ConfigError
from mvd.models.safe_types import safe_types

# Where official files keep the state dict, depending on which of their programs wrote them.
NESTING = ("model", "module")


class CheckpointError(ConfigError):
    """Weights that cannot be used: one sentence that says what, where, and the mend."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a pickle that holds tensors, plain containers and a Namespace.

    Official files are such pickles: they keep their arguments, an argparse.Namespace, beside the weights. One that
    asks for anything more is refused before any of it is run.

    Raises:
        CheckpointError: there is no such file, or it is damaged, unsafe or without weights.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}; name an existing .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(safe_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return find_state_dict(content, str(path))
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a hostile or damaged file can make the readers raise anything
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise CheckpointError(
                f"{path} is not a plain checkpoint: it holds more than tensors and settings, which could run code when "
                "loaded, or is no checkpoint at all; convert it to .safetensors where it comes from"
            ) from error
        raise CheckpointError(f"{path} is damaged or no checkpoint at all; fetch or write it again") from error


def find_state_dict(content: Any, origin: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content, which may be nested; `origin` names it in an error.

    Raises:
        CheckpointError: there are none.
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
