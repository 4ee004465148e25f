"""Loads and writes weights in the layout of the official releases of MVD, MAE and VideoMAE, which is ours too.

Parameter names are the official ones. What remains is finding the state dict, prefixes, the two layouts of attention
biases, and an exact report of what does not fit.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd.models.classifier import Classifier
from mvd.models.weight_files import CheckpointError, find_state_dict, read_weights

logger = logging.getLogger(__name__)

PREFIXES = ("encoder.", "backbone.")  # of the encoder in some files
CLASSIFIER_HEAD = ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
TABLE_TOLERANCE = 1e-3  # rounding of a position table in half precision


@dataclass(frozen=True)
class LoadReport:
    """The checkpoint's keys that were used and ignored, and the model's that keep their initial weights (missing).

    notes: harmless differences, each part of a sentence.
    """

    used: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line; ignored keys are counted by their first component."""
        parts = Counter(plain_key(key).partition(".")[0] for key in self.ignored)
        ignored = ", ".join(part if count == 1 else f"{part} ({count})" for part, count in parts.items())
        lines = [f"{len(self.used)} keys used", f"{len(self.ignored)} ignored" + (f": {ignored}" if ignored else "")]
        if self.missing:
            lines.append(f"freshly initialised: {', '.join(self.missing)}")
        return "; ".join([*lines, *self.notes])


@dataclass(frozen=True)
class Found:
    """A weight found in a checkpoint, and the keys that it comes from."""

    keys: tuple[str, ...]
    weight: Tensor


def load_official(model: nn.Module, source: Mapping[str, Any] | str | Path) -> LoadReport:
    """Copies weights in official layout into a network built by mvd.models.

    source: a state dict, possibly nested under `model` or `module`, or a .pth or .safetensors file with one. Fixed
    position tables are never loaded (QUIRKS 28). A classifier can load the encoder of a pre-trained student or video
    teacher; its fc_norm and head then keep their initial weights.

    Raises:
        CheckpointError: the file cannot be read or is not safe, or a required key is missing or has another shape.
    """
    origin = "the state dict" if isinstance(source, Mapping) else str(source)
    entries = find_state_dict(source, origin) if isinstance(source, Mapping) else read_weights(Path(source))
    weights = {name: weight for name, weight in model.state_dict().items() if not is_position_table(name)}
    found = find_weights(weights, entries)
    missing = tuple(name for name in weights if name not in found)
    starts_fresh = tuple(name for name in CLASSIFIER_HEAD if name in weights) if isinstance(model, Classifier) else ()
    problems = [f"{name} is missing" for name in missing if missing != starts_fresh]
    problems += [problem for name, given in found.items() for problem in _misfit(given, weights[name])]
    if problems:
        raise CheckpointError(f"{origin} does not fit this {type(model).__name__}: {_sum_up(problems)}")
    with torch.no_grad():
        for name, given in found.items():
            weights[name].copy_(given.weight)
    keys = {key for given in found.values() for key in given.keys}
    used, ignored = tuple(k for k in entries if k in keys), tuple(k for k in entries if k not in keys)
    return LoadReport(used, ignored, missing, (*_other_tables(model, entries), *_key_biases(found, entries)))


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights on the CPU in official layout, with the position tables it has."""
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in model.state_dict().items()}


def find_weights(names: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> dict[str, Found]:
    """The weights of a network that a checkpoint has, under any prefix and in either layout of attention biases."""
    key_of = {plain_key(key): key for key in entries} | {key: key for key in entries}  # an exact match wins

    def find(name: str) -> Found | None:
        key = key_of.get(name) or key_of.get(plain_key(name))
        return None if key is None else Found((key,), entries[key])

    found = {name: find(name) or _from_other_biases(name, find) for name in names}
    return {name: given for name, given in found.items() if given is not None}


def plain_key(key: str) -> str:
    """A key without the prefixes of an encoder in a larger network."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def is_position_table(name: str) -> bool:
    return "pos_embed" in name.rpartition(".")[2]


def _from_other_biases(name: str, find: Callable[[str], Found | None]) -> Found | None:
    """An attention bias from the other layout: `q_bias` and `v_bias`, or one `qkv.bias`.

    The key part of a `qkv.bias` has no effect: it adds the same value to all scores of a query before the softmax.
    """
    attention, _, last = name.rpartition(".")
    if last in ("q_bias", "v_bias"):
        full = find(f"{attention}.qkv.bias")
        if full is None or full.weight.ndim != 1 or len(full.weight) % 3:
            return None
        query_part, _, value_part = full.weight.chunk(3)
        return Found(full.keys, query_part if last == "q_bias" else value_part)
    if name.endswith(".qkv.bias"):
        attention = name.removesuffix(".qkv.bias")
        query, value = find(f"{attention}.q_bias"), find(f"{attention}.v_bias")
        if query is not None and value is not None:
            parts = (query.weight, torch.zeros_like(query.weight), value.weight)
            return Found(query.keys + value.keys, torch.cat(parts))
    return None


def _misfit(given: Found, wanted: Tensor) -> list[str]:
    """Problems of a weight from a checkpoint."""
    keys = " and ".join(given.keys)
    if given.weight.shape != wanted.shape:
        return [f"{keys} is {tuple(given.weight.shape)} instead of {tuple(wanted.shape)}"]
    if not given.weight.is_floating_point():
        return [f"{keys} has dtype {given.weight.dtype} instead of a floating-point type"]
    return []


def _other_tables(model: nn.Module, entries: Mapping[str, Tensor]) -> list[str]:
    """Notes on position tables of a checkpoint that differ from the model's, such as those of another resolution."""
    tables = dict([*model.named_parameters(), *model.named_buffers()])
    notes = []
    for key, given in entries.items():
        own = tables.get(key, tables.get(plain_key(key))) if is_position_table(key) else None
        if own is None or own.is_meta:
            continue
        same = given.shape == own.shape and torch.allclose(given.to(own), own, atol=TABLE_TOLERANCE)
        notes += [] if same else [f"its {key} differs from the fixed table and is ignored"]
    return notes


def _key_biases(found: Mapping[str, Found], entries: Mapping[str, Tensor]) -> list[str]:
    """A note if key biases that are not zero were dropped, which changes nothing."""
    full = [given.keys[0] for name, given in found.items() if name.endswith(".q_bias")]
    dropped = [key for key in full if key.endswith(".qkv.bias") and entries[key].chunk(3)[1].count_nonzero()]
    if not dropped:
        return []
    return [f"the key part of {len(dropped)} qkv biases is dropped, since it has no effect on attention"]


def _sum_up(problems: list[str], limit: int = 8) -> str:
    rest = len(problems) - limit
    listed = ", ".join(problems[:limit]) + (f" and {rest} more" if rest > 0 else "")
    if any(problem.startswith("head.") for problem in problems):
        return f"{listed}; build the classifier with the checkpoint's number of classes, or load a pre-trained encoder"
    return f"{listed}; choose a checkpoint of this network and size"


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Loads a file in official layout and logs in one line which keys were used and ignored.

    Raises:
        CheckpointError: the file does not fit, cannot be read or is not safe.
    """
    report = load_official(model, path)
    logger.info("%s: %s", path, report)
    return report
