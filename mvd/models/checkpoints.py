"""Weights in the layout of the official releases: MVD's, MAE's and VideoMAE's files, and ours, which are the same.

The networks name their parameters as the official ones do, so loading is a matter of finding the state dict, of
prefixes, and of saying exactly what does not fit.
"""

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mvd.config import ConfigError
from mvd.models.classifier import Classifier

# Where official files keep the encoder, depending on which of their programs wrote them.
PREFIXES = ("encoder.", "backbone.")
NESTING = ("model", "module")
CLASSIFIER_HEAD = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


class CheckpointError(ConfigError):
    """Weights that cannot be used: one sentence that says what, where, and the mend."""


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: its keys that were used and ignored, the model's that stay freshly initialised."""

    used: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]


def load_official(model: nn.Module, source: Mapping[str, Any] | str | Path) -> LoadReport:
    """Copies weights in official layout into a network built by mvd.models.

    source: a state dict, possibly nested under `model` or `module`, or a .pth or .safetensors file with one. The
    fixed position tables are never taken from it (QUIRKS 28). A classifier takes the encoder of a pre-trained
    student or video teacher and keeps its own fresh fc_norm and head, unless the source has them too.

    Raises:
        CheckpointError: the file cannot be read or is not safe, or a needed key is missing or of a wrong shape.
    """
    origin = "the state dict" if isinstance(source, Mapping) else str(source)
    entries = _state_dict(source if isinstance(source, Mapping) else _read(Path(source)), origin)
    key_of = {_plain(key): key for key in entries} | {key: key for key in entries}  # an exact name goes first
    weights = {name: weight for name, weight in model.state_dict().items() if not _is_position_table(name)}
    found = {name: key_of.get(name) or key_of.get(_plain(name)) for name in weights}
    missing = tuple(name for name, key in found.items() if key is None)
    pairs = [(name, key) for name, key in found.items() if key is not None]
    starts_fresh = CLASSIFIER_HEAD if isinstance(model, Classifier) else ()
    problems = [f"{name} is missing" for name in missing if missing != starts_fresh]
    problems += [
        f"{key} is {tuple(entries[key].shape)} instead of {tuple(weights[name].shape)}"
        for name, key in pairs
        if entries[key].shape != weights[name].shape
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit this {type(model).__name__}: {_sum_up(problems)}")
    with torch.no_grad():
        for name, key in pairs:
            weights[name].copy_(entries[key])
    used = {key for _, key in pairs}
    return LoadReport(tuple(k for k in entries if k in used), tuple(k for k in entries if k not in used), missing)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights on the CPU, in official layout, position tables included where that has them."""
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in model.state_dict().items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}; name an existing .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files hold their arguments too
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain checkpoint: it holds more than tensors and settings, which could run code when "
            "loaded, or is no checkpoint at all; convert it to .safetensors where it comes from"
        ) from error
    except (RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint at all; fetch or write it again") from error


def _state_dict(content: Any, origin: str) -> dict[str, Tensor]:
    for entry in NESTING:
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(
            f"{origin} holds no weights, neither directly nor under {' or '.join(NESTING)}; give a state dict"
        )
    return tensors


def _plain(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _is_position_table(name: str) -> bool:
    return "pos_embed" in name.rpartition(".")[2]


def _sum_up(problems: list[str], limit: int = 8) -> str:
    rest = len(problems) - limit
    listed = ", ".join(problems[:limit]) + (f" and {rest} more" if rest > 0 else "")
    if any(problem.startswith("head.") for problem in problems):
        return f"{listed}; build the classifier with the checkpoint's number of classes, or load a pre-trained encoder"
    return f"{listed}; choose a checkpoint of this network and size"
