"""The rows' training stages at real size, for `pytest -m fullsize` and benchmarks/gpu.py."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments import all as all_rows
from mvd.config import Finetune, Pretrain
from mvd.models import build_image_teacher, build_video_teacher

Recipe = Pretrain | Finetune


def recipes() -> dict[str, Recipe]:
    """The seven pre-trainings and all different fine-tunings, by the name of the first row that has each."""
    names: dict[Recipe, str] = {}
    for row in all_rows.rows:
        names.setdefault(row.pretrain, f"pretrain-{row.pretrain.name}")
        names.setdefault(row.finetune, f"finetune-{row.name}")
    return {name: recipe for recipe, name in sorted(names.items(), key=lambda item: isinstance(item[0], Finetune))}


def with_batch(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with this global batch, without warmup."""
    optimization = dataclasses.replace(
        recipe.optimization, global_batch=samples, micro_batch=samples, epochs=1, schedule_epochs=None, warmup_epochs=0
    )
    if isinstance(recipe, Finetune):
        mixing = dataclasses.replace(recipe.mixing, group=samples)
        return dataclasses.replace(recipe, optimization=optimization, mixing=mixing)
    return dataclasses.replace(recipe, optimization=optimization)


def random_teachers(size: str, folder: Path) -> dict[str, str]:
    """Files with random weights for both teachers of a size: role -> path."""
    torch.manual_seed(0)
    files = {}
    for role, build in {"image_teacher": build_image_teacher, "video_teacher": build_video_teacher}.items():
        files[role] = str(folder / f"{role}_{size}.safetensors")
        save_file(build(size).state_dict(), files[role])
    return files


class GradientWatch:
    """Records the norm of every gradient in the backward pass, before ZeRO partitions the gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: dict[str, Tensor] = {}
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.trainable = list(trainable)
        self.hooks = [parameter.register_hook(self._note(name)) for name, parameter in trainable.items()]

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.norms[name] = gradient.norm()

        return hook

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self.hooks:
            hook.remove()

    def problems(self) -> list[str]:
        """Problems of trainable parameters: no gradient, or one that is not finite."""
        missing = [f"{name} has no gradient" for name in self.trainable if name not in self.norms]
        return missing + [
            f"the gradient of {name} is {norm}" for name, norm in self.norms.items() if not norm.isfinite()
        ]


if __name__ == "__main__":  # in a process of its own, which returns its memory
    random_teachers(sys.argv[1], Path(sys.argv[2]))
