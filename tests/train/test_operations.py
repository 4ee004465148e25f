"""The operations of one update, which decide how fast a GPU is fed: every one costs the CPU a launch.

Networks have the depth of ViT-S and ViT-B but few channels and tokens, on which the number of operations does not
depend. Counted on the CPU, where autocast converts the same tensors. Version 0.2 took 2,554 for ViT-B from ViT-B and
2,004 for its fine-tuning: under ZeRO-1, with teachers in fp32, and with four operations per drop path layer.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.vitb_from_vitb_k400 import row
from mvd.batch import Batch
from mvd.config import SIZES, Finetune, Pretrain
from mvd.config.sizes import ClipShape, ImageShape, Transformer
from mvd.data.clip.masking import tube_mask
from mvd.data.on_device import prepare
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.train import tasks
from mvd.train.engine import build_engine, take_step
from mvd.train.optimizer import build_optimizer
from mvd.train.sample_seeded_dropout import SampleSeededLayers
from tests.runs import succeed

CPU = torch.device("cpu")
CLIP = ClipShape(frames=4, image_size=64)
# Launch nothing: they only describe the same memory in another way.
VIEWS = ("view", "expand", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "permute", "alias", "detach")
VIEWS += ("split", "unbind", "as_strided", "empty", "_unsafe_view")
# Wait for the device.
SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "equal")


class Counting(TorchDispatchMode):
    """Counts the operations that are dispatched, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name not in VIEWS:
            self.names[name] += 1
        return function(*arguments, **(keywords or {}))


def shrink() -> None:
    """Makes "base" as thin and its clips as short as the count allows."""
    thin = {
        role: dataclasses.replace(getattr(SIZES["base"], role), width=48, heads=3) for role in ("encoder", "decoder")
    }
    image = ImageShape(image_size=64)
    assert isinstance(thin["encoder"], Transformer)
    SIZES["base"] = dataclasses.replace(SIZES["base"], clip=CLIP, image=image, image_training=image, **thin)


def micro_batch(recipe: Pretrain | Finetune) -> dict[str, torch.Tensor]:
    """As a loader makes it, of two clips."""
    clips = {
        "video": torch.randint(0, 255, (2, 3, CLIP.frames, CLIP.image_size, CLIP.image_size), dtype=torch.uint8),
        "layer_seeds": torch.tensor([1, 2]),
    }
    if isinstance(recipe, Pretrain):
        masks = [tube_mask(np.random.default_rng(seed), CLIP, recipe.mask_ratio) for seed in range(2)]
        return clips | {"mask": torch.from_numpy(np.stack(masks))}
    seeds = {"noise_seeds": torch.tensor([1, 2]), "mix_seeds": torch.tensor([5, 5])}
    return clips | seeds | {"erase": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.tensor([3, 4])}


def count(folder: Path) -> None:
    """Counts the second update of a pre-training and of a fine-tuning of ViT-B, in one process."""
    start_processes()
    shrink()
    tasks.load_weights = lambda *_, **__: None
    found = {}
    for recipe in (row.pretrain, row.finetune):
        if isinstance(recipe, Pretrain):
            task: tasks.Task = tasks.Distillation(recipe, {"image_teacher": "", "video_teacher": ""}, "bf16", CPU)
        else:
            task = tasks.Classification(recipe, 400, None)
        layers = SampleSeededLayers(task.model, "bf16")
        optimizer = build_optimizer(task.model, recipe.optimization)
        engine = build_engine(task.model, optimizer, "zero0", Batch(2, 1, 1), "bf16")
        engine.train()
        raw = micro_batch(recipe)
        for _ in range(2):
            layers.draw(raw["layer_seeds"], CPU)
            with Counting() as counting:
                engine.backward(task.losses(engine, prepare(raw, recipe, CPU))["loss"])
                take_step(engine)
        found[type(recipe).__name__] = counting.names
    write_json(folder / "found.json", found)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    folder = tmp_path_factory.mktemp("operations")
    succeed(count, folder, count=1)
    return {name: Counter(found) for name, found in json.loads((folder / "found.json").read_text()).items()}


@pytest.mark.parametrize(("kind", "most"), [("Pretrain", 1330), ("Finetune", 815)])
def test_operations_of_an_update(kind, most, operations):
    found = operations[kind]
    assert found["addmm"] > 40 and found["mm"] > 40  # forward and backward pass were counted
    assert found.total() <= most, found.most_common(20)


@pytest.mark.parametrize("kind", ["Pretrain", "Finetune"])
def test_an_update_waits_for_the_device_only_for_the_gradient_norm(kind, operations):
    """The loop waits once more, for the mean of the losses."""
    assert sum(operations[kind][name] for name in SYNCHRONISING) == 1
