"""Checks a weights file before a stage is queued: keys, shapes, number of classes, values. Must not import torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mvd.config import SIZES
from mvd.config.sizes import Size
from mvd.weight_keys import CheckpointError, Fit, check_finite, fit, plain_key
from mvd.weight_shapes import ITEM_SIZES, Span, Stored, read_header

if TYPE_CHECKING:
    import numpy as np

Role = Literal["image_teacher", "video_teacher", "pretrain", "finetune"]
NETWORKS: dict[Role, str] = {"image_teacher": "ImageTeacher", "video_teacher": "VideoTeacher"}


def check_weights(path: Path, role: Role, size: str, classes: int = 0) -> Fit:
    """How the weights of a file fit the network that a stage loads them into; values are not read.

    role: the stage's input (mvd.stage.Stage.inputs). size: the network's, in mvd.config.sizes. classes: of the
    classifier that starts from them (pretrain) or that they are (finetune).

    Raises:
        CheckpointError: the file cannot be read, is of another size or number of classes, or lacks keys.
    """
    header = read_header(path)
    _check_size(path, {name: form.shape for name, form in header.forms.items()}, size)
    wanted = network_shapes(role, SIZES[size], classes)
    found = fit(wanted, header.forms, str(path), NETWORKS.get(role, "Classifier"), drop_other_head=role == "pretrain")
    if role == "finetune" and found.missing:
        raise CheckpointError(f"{path} lacks {', '.join(found.missing)}; give the weights of a fine-tuning stage")
    return Fit(found.sources, found.missing, (*header.notes, *found.notes))


def check_values(path: Path, found: Fit) -> None:
    """Refuses weights that are NaN or infinite, among those that fit a network.

    Raises:
        CheckpointError: there are some.
    """
    import numpy as np

    header = read_header(path)
    keys = dict.fromkeys(key for sources in found.sources.values() for key in sources)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    check_finite((key for key in keys if not _is_finite(data, header.tensors[key], header.spans, path)), str(path))


def network_shapes(role: Role, size: Size, classes: int = 0) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a network without its position tables, in the order of its state dict."""
    width, hidden = size.encoder.width, size.encoder.mlp_width
    image = role == "image_teacher"
    side = size.image.patch_size if image else size.clip.patch_size
    kernel = (side, side) if image else (size.clip.tubelet, side, side)
    biases = {"qkv.bias": (3 * width,)} if image else {"q_bias": (width,), "v_bias": (width,)}
    block: dict[str, tuple[int, ...]] = _layer_norm("norm1", width)
    block |= {f"attn.{name}": shape for name, shape in biases.items()}
    block |= {"attn.qkv.weight": (3 * width, width)} | _linear("attn.proj", width, width) | _layer_norm("norm2", width)
    block |= _linear("mlp.fc1", width, hidden) | _linear("mlp.fc2", hidden, width)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)} if image else {}
    shapes |= {"patch_embed.proj.weight": (width, 3, *kernel), "patch_embed.proj.bias": (width,)}
    for number in range(size.encoder.depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    if role in ("pretrain", "finetune"):
        return shapes | _layer_norm("fc_norm", width) | _linear("head", width, classes)
    shapes |= _layer_norm("norm", width)
    return shapes if image else {f"encoder.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _layer_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _check_size(path: Path, shapes: Mapping[str, tuple[int, ...]], size: str) -> None:
    """Refuses an encoder of another width or depth in one short sentence, instead of by each weight's shape."""
    width, depth = SIZES[size].encoder.width, SIZES[size].encoder.depth
    blocks = {plain_key(name): shape for name, shape in shapes.items() if plain_key(name).startswith("blocks.")}
    widths = {shape[1] for name, shape in blocks.items() if name.endswith("attn.qkv.weight") and len(shape) == 2}
    numbers = {int(number) for name in blocks if (number := name.split(".")[1]).isdigit()}
    if len(widths) == 1 and numbers and (widths, max(numbers) + 1) != ({width}, depth):
        raise CheckpointError(
            f"{path} holds an encoder of width {widths.pop()} and depth {max(numbers) + 1}, but size {size!r} has "
            f"width {width} and depth {depth}; use another file"
        )


def _is_finite(
    data: "np.memmap[Any, np.dtype[np.uint8]]", tensor: Stored, spans: Mapping[str, Span], path: Path
) -> bool:
    """Whether all values of a tensor are finite; True if they cannot be read here: the loader checks them again."""
    import numpy as np

    span, dtype = spans.get(tensor.storage), tensor.form.dtype
    if span is None or not dtype.startswith(("float", "bfloat")) or dtype not in ITEM_SIZES:
        return True
    item = ITEM_SIZES[dtype]
    shape, strides = tensor.form.shape, tensor.strides
    extent = item * (1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=False)))
    start = item * tensor.offset
    raw = data[span.start :][: span.length][start : start + extent]
    if len(strides) != len(shape) or min(0, tensor.offset, *strides) < 0 or len(raw) != extent:
        raise CheckpointError(f"{path} is damaged: a tensor is longer than its data; download or write it again")
    values: Any = np.frombuffer(raw, dtype=np.uint16 if dtype == "bfloat16" else dtype)
    values = np.lib.stride_tricks.as_strided(values, shape, [stride * item for stride in strides], writeable=False)
    if dtype == "bfloat16":
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return math.isfinite(values.min(initial=0.0)) and math.isfinite(values.max(initial=0.0))
