"""Loads and writes weights in the layout of the official releases of MVD, MAE and VideoMAE, which is ours too.

Parameter names are the official ones; mvd.weight_keys finds the state dict, strips prefixes, and says what does not
fit. Here the two layouts of attention biases are converted, and the weights are checked and copied.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd.models.weight_files import read_weights
from mvd.weight_keys import CheckpointError, Form, check_finite, fit, is_position_table, plain_key, unwrap

logger = logging.getLogger(__name__)

__all__ = ["CheckpointError", "LoadReport", "find_weights", "load_official", "load_weights", "to_official"]

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


def load_official(
    model: nn.Module, source: Mapping[str, Any] | str | Path, *, drop_other_head: bool = False
) -> LoadReport:
    """Copies weights in official layout into a network built by mvd.models.

    source: a state dict, possibly nested as training programs save it, or a .pth or .safetensors file with one. Fixed
    position tables are never loaded (QUIRKS 28). A classifier can load the encoder of a pre-trained student or video
    teacher; its fc_norm and head then keep their initial weights. With drop_other_head, it can also load a classifier
    of other classes; its head then keeps its initial weights, as in the official fine-tuning.

    Raises:
        CheckpointError: the file cannot be read or is not safe, or a required key is missing, or has another shape,
            or holds NaN or infinite values.
    """
    origin = "the state dict" if isinstance(source, Mapping) else str(source)
    entries, place = unwrap(source, Tensor, origin) if isinstance(source, Mapping) else read_weights(Path(source))
    weights = {name: weight for name, weight in model.state_dict().items() if not is_position_table(name)}
    on_meta = any(weight.is_meta for weight in weights.values())
    wanted = {name: tuple(weight.shape) for name, weight in weights.items()}
    forms = {key: _form(tensor, on_meta) for key, tensor in entries.items()}
    how = fit(wanted, forms, origin, type(model).__name__, drop_other_head=drop_other_head)
    found = find_weights(how.sources, entries)
    check_finite((name for name, value in found.items() if not _is_finite(value, weights[name])), origin)
    with torch.no_grad():
        for name, value in found.items():
            weights[name].copy_(value)
    keys = {key for given in how.sources.values() for key in given}
    used, ignored = tuple(k for k in entries if k in keys), tuple(k for k in entries if k not in keys)
    remarks = (*place, *how.notes, *_other_tables(model, entries), *_key_biases(how.sources, entries))
    return LoadReport(used, ignored, how.missing, remarks)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights on the CPU in official layout, with the position tables it has."""
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in model.state_dict().items()}


def find_weights(sources: Mapping[str, tuple[str, ...]], entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that come from a checkpoint's keys (mvd.weight_keys), in the network's layout of attention biases.

    The key part of a `qkv.bias` has no effect: it adds the same value to all scores of a query before the softmax.
    """
    found = {}
    for name, keys in sources.items():
        first = entries[keys[0]]
        if len(keys) == 2:
            found[name] = torch.cat([first, torch.zeros_like(first), entries[keys[1]]])
        elif keys[0].endswith(".qkv.bias") and not name.endswith(".qkv.bias"):
            found[name] = first.chunk(3)[0 if name.endswith(".q_bias") else 2]
        else:
            found[name] = first
    return found


def _form(tensor: Tensor, on_meta: bool) -> Form:
    """What a tensor of a checkpoint is; on_meta: the network has no values either."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return Form((), kind="sparse" if "sparse" in str(tensor.layout) else "nested")
    if tensor.is_quantized:
        return Form((), kind="quantized")
    kind = "meta" if tensor.is_meta and not on_meta else "dense"
    return Form(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), kind)


def _is_finite(given: Tensor, weight: Tensor) -> bool:
    """Whether all values are finite in the network's precision."""
    return given.is_meta or bool(torch.isfinite(given.to(weight.dtype)).all())


def _other_tables(model: nn.Module, entries: Mapping[str, Tensor]) -> list[str]:
    """Notes on position tables of a checkpoint that differ from the model's, such as those of another resolution."""
    tables = dict([*model.named_parameters(), *model.named_buffers()])
    notes = []
    for key, given in entries.items():
        own = tables.get(key, tables.get(plain_key(key))) if is_position_table(key) else None
        if own is None or own.is_meta or _form(given, on_meta=False).kind != "dense":
            continue
        same = given.shape == own.shape and torch.allclose(given.to(own), own, atol=TABLE_TOLERANCE)
        notes += [] if same else [f"its {key} differs from the fixed table and is ignored"]
    return notes


def _key_biases(sources: Mapping[str, tuple[str, ...]], entries: Mapping[str, Tensor]) -> list[str]:
    """A note if key biases that are not zero were dropped, which changes nothing."""
    full = [keys[0] for name, keys in sources.items() if name.endswith(".q_bias")]
    dropped = [key for key in full if key.endswith(".qkv.bias") and entries[key].chunk(3)[1].count_nonzero()]
    if not dropped:
        return []
    return [f"the key part of {len(dropped)} qkv biases is dropped, since it has no effect on attention"]


def load_weights(model: nn.Module, path: str | Path, *, drop_other_head: bool = False) -> LoadReport:
    """Loads a file in official layout as load_official does, and logs in one line which keys were used and ignored.

    Raises:
        CheckpointError: the file does not fit, cannot be read or is not safe.
    """
    report = load_official(model, path, drop_other_head=drop_other_head)
    logger.info("%s: %s", path, report)
    return report
