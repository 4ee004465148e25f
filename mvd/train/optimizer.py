"""AdamW and its parameter groups: weight decay, and the learning rate of each layer."""

import re
from typing import Any

import torch
from torch import nn

from mvd.config import Optimization


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters, with the keys params, names, weight_decay and lr_scale.

    Biases and other 1-D parameters have no weight decay; all others have, mask tokens included (QUIRKS 22). With
    `layer_decay`, a layer's learning rate is multiplied by it once per layer above: the embedding is layer 0, block i
    is layer i + 1, and parameters after the blocks have the full rate (QUIRKS 11).
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    top = 1 + max((_layer(name, top=0) for name, _ in trainable), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trainable:
        decayed = parameter.ndim > 1 and not name.endswith(".bias")
        layer = top if layer_decay is None else _layer(name, top)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": 1.0 if layer_decay is None else layer_decay ** (top - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW over the model's parameter groups, at the peak learning rate times each group's lr_scale."""
    groups = parameter_groups(model, optimization.weight_decay, optimization.layer_decay)
    for group in groups:
        group["lr"] = optimization.peak_lr * group["lr_scale"]
    return torch.optim.AdamW(groups, betas=optimization.betas, eps=optimization.eps, fused=True)


def _layer(name: str, top: int) -> int:
    if name.startswith(("patch_embed.", "cls_token")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else top
