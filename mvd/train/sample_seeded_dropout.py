"""Drop path and dropout seeded by sample instead of by process.

timm's and torch's layers draw from each process's global random state, so the draws would depend on the number of
processes and on the micro-batch. Here they follow from the clip's seed alone (which is made of the recipe's seed, the
epoch, the video and its augmented copy): the same on any number of processes and after any interruption.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mvd.config import Precision


class SampleDropPath(nn.Module):
    """timm's DropPath with draws made beforehand: `factors`, (B,), which are 0 or 1 / (1 - rate)."""

    factors: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        return inputs * self.factors.to(inputs.dtype).view(-1, *[1] * (inputs.ndim - 1))


class SampleDropout(nn.Module):
    """Dropout of (B, ...) with draws seeded by each sample's seed and this layer's number."""

    seeds: list[int]

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate, self.number = rate, number

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        generators = [torch.Generator().manual_seed(seed + 1 + self.number) for seed in self.seeds]
        uniform = torch.stack([torch.rand(inputs.shape[1:], generator=generator) for generator in generators])
        kept = (uniform >= self.rate).to(inputs.device, inputs.dtype, non_blocking=True)
        return inputs * kept / (1 - self.rate)


class SampleSeededLayers:
    """Replaces a network's drop path and dropout layers by those above, except for rates of 0.

    precision: that of the forward pass, in which the factors of all drop path layers are made at once.
    """

    def __init__(self, model: nn.Module, precision: Precision = "fp32") -> None:
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.paths: list[SampleDropPath] = []
        self.dropouts: list[SampleDropout] = []
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, DropPath) and layer.drop_prob:
                    self.paths.append(SampleDropPath(layer.drop_prob))
                    setattr(parent, name, self.paths[-1])
                elif isinstance(layer, nn.Dropout) and layer.p:
                    self.dropouts.append(SampleDropout(layer.p, len(self.dropouts)))
                    setattr(parent, name, self.dropouts[-1])

    def draw(self, seeds: Tensor, device: torch.device) -> None:
        """Makes the draws for the next forward pass; seeds: of its clips, (B,) int64."""
        if self.paths:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
            uniform = torch.stack([torch.rand(len(self.paths), generator=generator) for generator in generators])
            rates = torch.tensor([path.rate for path in self.paths], dtype=torch.float64)
            factors = ((uniform >= rates.float()) / (1 - rates)).to(self.dtype).to(device, non_blocking=True)
            for path, own in zip(self.paths, factors.unbind(dim=1), strict=True):
                path.factors = own
        for dropout in self.dropouts:
            dropout.seeds = seeds.tolist()
