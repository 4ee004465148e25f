"""Rebuilds what the golden files were made with: weights, inputs and summaries (see tests/golden)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden(name: str) -> dict:
    """The content of a golden .npz or .json file."""
    path = GOLDEN / name
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    return json.loads(path.read_text())


def with_golden_weights(model: nn.Module) -> nn.Module:
    """Fills every weight but the fixed position tables from a generator seeded by its name."""
    state = model.state_dict()
    for key, weight in state.items():
        if key.rpartition(".")[2].startswith("pos_embed"):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        value = torch.randn(weight.shape, generator=generator) * 0.02
        if key.endswith(("norm1.weight", "norm2.weight", "norm.weight", "fc_norm.weight")):
            value += 1
        weight.copy_(value)
    return model.eval()


def golden_video() -> Tensor:
    return torch.randn(2, 3, 16, 224, 224, generator=torch.Generator().manual_seed(1234))


def golden_images(image_size: int) -> Tensor:
    return torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(1234))


def golden_mask() -> Tensor:
    return tube_mask(slices=8, positions=196, masked=176, seed=99)


def stats(tensor: Tensor) -> np.ndarray:
    x = tensor.detach().double().flatten()
    return torch.stack([x.sum(), x.mean(), x.std(), x.abs().mean(), x.min(), x.max()]).numpy()


def assert_golden(tensor: Tensor, file: dict, field: str) -> None:
    """Compares an output with a golden field; it may hold only the first samples of the golden batch."""
    assert tuple(tensor.shape[1:]) == tuple(file[f"{field}_shape"][1:])
    values = tensor.detach().numpy()
    values = values[:, ::97, ::31] if values.ndim == 3 else values
    np.testing.assert_allclose(values, file[f"{field}_slice"][: len(values)], rtol=1e-4, atol=2e-5)
    if len(tensor) == file[f"{field}_shape"][0]:
        np.testing.assert_allclose(stats(tensor)[1:], file[f"{field}_stats"][1:], rtol=1e-4, atol=2e-5)


def tube_mask(slices: int, positions: int, masked: int, batch: int = 2, seed: int = 0) -> Tensor:
    """Tube masks (batch, slices * positions), different in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, positions, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(positions, generator=generator)[:masked]] = True
    return mask.repeat(1, slices)
