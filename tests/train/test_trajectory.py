"""Twenty updates of the real loop and engine against a plain single-process PyTorch loop on the same data.

The run has two processes, ZeRO-1 and two micro-batches a process and update. Its list holds 44 videos where an update
takes 8, so that after the five updates of an epoch one micro-batch of each process is left over. The official loop
would let its gradient leak into the next epoch and, in the last one, overrun the schedule (QUIRKS 13, 20, 21).
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mvd.config.run_settings import DatasetPaths
from mvd.data.datasets import SampleKey, build_dataset
from mvd.data.loader import epoch_order
from mvd.data.on_device import prepare
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from mvd.run import run_stage
from mvd.stage import Stage
from tests.data.stages import PLAIN
from tests.runs import curve, read_metrics, read_result, small_stage, succeed, write_stage

VIDEOS, BATCH, GROUP = 44, 8, 4
STEPS, EPOCHS = 5, 4
UPDATES = STEPS * EPOCHS
PEAK, FLOOR, WARMUP = 0.016 * BATCH / 256, 1e-4 * BATCH / 256, 2
LAYER_DECAY = 0.75


class Plain(NamedTuple):
    """Losses, gradient norms and learning rates of the plain loop by update, and its final weights."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


def run_both(folder: Path) -> None:
    for path in sorted(folder.glob("*/stage.yaml")):
        run_stage(Stage.from_yaml(path))


@pytest.fixture(scope="module")
def stages(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("trajectory")
    lines = (motion_root / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("".join(f"{line}\n" for line in lines[:VIDEOS]))
    data = DatasetPaths(root=str(motion_root), train=str(folder / "train.csv"))
    how = {"epochs": EPOCHS, "warmup_epochs": WARMUP / STEPS, "checkpoint_every": UPDATES, "validate_every": EPOCHS}
    augmentation = dataclasses.replace(PLAIN, samples=2, flip=0.5, erase=0.25)
    made = {
        "pretrain": small_stage(
            "pretrain", "pretrain", folder, data, teachers, schedule_epochs=EPOCHS + 1, drop_path=0.0, **how
        ),
        "finetune": small_stage(
            "finetune",
            "finetune",
            folder,
            data,
            schedule_epochs=None,
            drop_path=0.0,
            layer_decay=LAYER_DECAY,
            augmentation=augmentation,
            workers=1,
            **how,
        ),
    }
    for stage in made.values():
        write_stage(stage)
    succeed(run_both, folder)
    return made


@pytest.fixture(scope="module")
def plain(stages) -> dict[str, Plain]:
    return {"pretrain": plain_pretraining(stages["pretrain"]), "finetune": plain_finetuning(stages["finetune"])}


def plain_pretraining(stage: Stage) -> Plain:
    torch.manual_seed(stage.recipe.seed)
    student = build_student("tiny", teacher="tiny")
    image_teacher, video_teacher = build_image_teacher("tiny"), build_video_teacher("tiny")
    image_teacher.load_state_dict(load_file(stage.inputs["image_teacher"]))
    video_teacher.load_state_dict(load_file(stage.inputs["video_teacher"]))

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        video, mask = batch["video"], batch["mask"]
        with torch.no_grad():
            image_features = torch.cat([image_teacher(video[:, :, t]) for t in range(0, 16, 2)], dim=1)
            video_features = video_teacher(video)
        predicted = student(video, mask)
        return sum(
            F.smooth_l1_loss(ours, theirs[mask].view_as(ours))
            for ours, theirs in zip(predicted, (image_features, video_features), strict=True)
        )

    return plain_loop(stage, student, loss_of, laid_out=EPOCHS + 1, layer_decay=None)


def plain_finetuning(stage: Stage) -> Plain:
    torch.manual_seed(stage.recipe.seed)
    classifier = build_classifier("tiny", num_classes=8)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return -(batch["targets"] * classifier(batch["video"]).log_softmax(dim=1)).sum(dim=1).mean()

    return plain_loop(stage, classifier, loss_of, laid_out=EPOCHS, layer_decay=LAYER_DECAY)


def plain_loop(
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    laid_out: int,
    layer_decay: float | None,
) -> Plain:
    """Every update a whole batch in the order of its epoch; an epoch's incomplete last batch is dropped."""
    dataset = build_dataset(stage)
    optimizer = torch.optim.AdamW(groups(model, layer_decay), betas=(0.9, 0.95), eps=1e-8)
    losses, norms, rates = [], [], []
    for epoch in range(EPOCHS):
        order = epoch_order(stage.recipe.seed, epoch, VIDEOS)
        for step in range(STEPS):
            places = range(step * BATCH, (step + 1) * BATCH)
            samples = [dataset[SampleKey(epoch, order[place], place // GROUP)] for place in places]
            loss = loss_of(prepare(dataset.collate(samples), stage.recipe, "cpu"))
            rates.append(learning_rate(epoch * STEPS + step, laid_out * STEPS))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1] * group["scale"]
            optimizer.zero_grad()
            loss.backward()
            norms.append(math.hypot(*(p.grad.norm().item() for p in model.parameters() if p.grad is not None)))
            optimizer.step()
            losses.append(loss.item())
    return Plain(losses, norms, rates, model.state_dict())


def groups(model: nn.Module, layer_decay: float | None) -> list[dict]:
    """One parameter a group; in fine-tuning its rate falls with every layer above it (four blocks, then the head)."""
    made = []
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d)", name)
        above = 4 - int(block[1]) if block else 5 if name.startswith("patch_embed") else 0
        scale = 1.0 if layer_decay is None else layer_decay**above
        made.append({"params": [parameter], "weight_decay": 0.05 if parameter.ndim > 1 else 0.0, "scale": scale})
    return [group for group in made if group["params"][0].requires_grad]


def learning_rate(update: int, laid_out: int) -> float:
    if update < WARMUP:
        return PEAK * update / (WARMUP - 1)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * (update - WARMUP) / (laid_out - WARMUP))) / 2


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_losses_and_weights_are_those_of_the_plain_loop(stages, plain, kind):
    expected, losses = plain[kind], curve(stages[kind], "loss")
    assert len(losses) == UPDATES
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(curve(stages[kind], "grad_norm"), expected.norms, rtol=1e-5)
    weights = load_file(stages[kind].directory / "weights.safetensors")
    torch.testing.assert_close(weights, expected.weights, rtol=0, atol=1e-5)


def test_distillation_reduces_the_loss(stages):
    losses = curve(stages["pretrain"], "loss")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_leftover_of_an_epoch_is_left_out(stages, plain, kind):
    """No update beyond the whole batches of each epoch, and none beyond the schedule."""
    stage = stages[kind]
    assert read_result(stage)["updates"] == UPDATES
    records = [record for record in read_metrics(stage) if "loss" in record]
    assert [record["epoch"] for record in records] == [1 + update // STEPS for update in range(UPDATES)]
    np.testing.assert_allclose(curve(stage, "lr"), plain[kind].rates, rtol=1e-12, atol=1e-18)
