"""The networks once more, in plain PyTorch, from their description and a state dict alone.

Nothing here comes from `mvd` or timm, so that an agreement says something. It covers the sizes for which no golden
outputs exist; where they do exist, it agrees with them (test_reference.py).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def code_1d(width: int, positions: np.ndarray) -> np.ndarray:
    """All sines first, then all cosines."""
    omega = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angle = positions.astype(np.float64)[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def spatial_table(width: int, side: int) -> np.ndarray:
    """Tokens in (h, w) order; the column comes in the first half of the channels."""
    row, column = np.divmod(np.arange(side * side), side)
    return np.concatenate([code_1d(width // 2, column), code_1d(width // 2, row)], axis=1)


def student_table(width: int, slices: int, side: int) -> Tensor:
    time = code_1d(width // 4, np.repeat(np.arange(slices), side * side))
    place = np.tile(spatial_table(3 * width // 4, side), (slices, 1))
    return torch.from_numpy(np.concatenate([time, place], axis=1)).float()


def image_teacher_table(width: int, side: int) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), spatial_table(width, side)])).float()


def video_teacher_table(width: int, tokens: int) -> Tensor:
    table = np.empty((tokens, width))
    for j in range(width):
        angle = np.arange(tokens) / 10000.0 ** (2 * (j // 2) / width)
        table[:, j] = np.cos(angle) if j % 2 else np.sin(angle)
    return torch.from_numpy(table).float()


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    if f"{name}.qkv.bias" in state:
        bias = state[f"{name}.qkv.bias"]
    else:
        q_bias, v_bias = state[f"{name}.q_bias"], state[f"{name}.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(width), v_bias])
    qkv = (x @ state[f"{name}.qkv.weight"].T + bias).view(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)
    return linear((weights @ v).transpose(1, 2).reshape(batch, tokens, width), state, f"{name}.proj")


def mlp(x: Tensor, state: State, name: str) -> Tensor:
    hidden = linear(x, state, f"{name}.fc1")
    return linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, state, f"{name}.fc2")


def blocks(x: Tensor, state: State, prefix: str, heads: int) -> Tensor:
    """All blocks `<prefix>0`, `<prefix>1`, ... that the state dict holds."""
    number = 0
    while f"{prefix}{number}.norm1.weight" in state:
        name = f"{prefix}{number}"
        x = x + attention(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn", heads)
        x = x + mlp(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp")
        number += 1
    return x


def tokens_of(inputs: Tensor, state: State, name: str) -> Tensor:
    """Images or clips as embedded tokens, in (h, w) or (t, h, w) order."""
    weight = state[f"{name}.proj.weight"]
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    return convolve(inputs, weight, state[f"{name}.proj.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def student(state: State, heads: int, decoder_heads: int, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, width = len(video), state["norm.weight"].shape[0]
    slices, side = video.shape[2] // 2, math.isqrt(mask.shape[1] // (video.shape[2] // 2))
    tokens = tokens_of(video, state, "patch_embed") + student_table(width, slices, side)
    visible = layer_norm(blocks(tokens[~mask].view(batch, -1, width), state, "blocks.", heads), state, "norm")
    outputs = []
    for branch in ("img", "vid"):
        inner = state[f"down_{branch}.weight"].shape[0]
        positions = student_table(inner, slices, side).expand(batch, -1, -1)
        seen = linear(visible, state, f"down_{branch}") + positions[~mask].view(batch, -1, inner)
        hidden = state[f"mask_token_{branch}"] + positions[mask].view(batch, -1, inner)
        name = f"decoder_{branch}"
        decoded = blocks(torch.cat([seen, hidden], dim=1), state, f"{name}.blocks.", decoder_heads)
        outputs.append(linear(layer_norm(decoded[:, seen.shape[1] :], state, f"{name}.norm"), state, f"{name}.head"))
    return outputs[0], outputs[1]


def image_teacher(state: State, heads: int, frames: Tensor) -> Tensor:
    patches = tokens_of(frames, state, "patch_embed")
    table = image_teacher_table(patches.shape[2], math.isqrt(patches.shape[1]))
    tokens = torch.cat([state["cls_token"].expand(len(frames), -1, -1), patches], dim=1) + table
    return blocks(tokens, state, "blocks.", heads)[:, 1:]


def video_teacher(state: State, heads: int, video: Tensor) -> Tensor:
    tokens = tokens_of(video, state, "encoder.patch_embed")
    return blocks(tokens + video_teacher_table(tokens.shape[2], tokens.shape[1]), state, "encoder.blocks.", heads)


def classifier(state: State, heads: int, video: Tensor) -> Tensor:
    tokens = tokens_of(video, state, "patch_embed")
    slices = video.shape[2] // 2
    table = student_table(tokens.shape[2], slices, math.isqrt(tokens.shape[1] // slices))
    pooled = blocks(tokens + table, state, "blocks.", heads).mean(dim=1)
    return linear(layer_norm(pooled, state, "fc_norm"), state, "head")
