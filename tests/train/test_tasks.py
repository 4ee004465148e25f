"""The tasks of the fourteen rows, built on the meta device."""

import pytest
import torch
from torch import nn

from experiments import all as all_rows
from mvd.config import DATASETS, SIZES, Finetune, Pretrain
from mvd.models import build_image_teacher, build_video_teacher
from mvd.stage import Stage
from mvd.train import tasks
from tests.data.stages import recipe
from tests.models.test_initialisation import drop_rates

PRETRAININGS = {row.pretrain.name: row.pretrain for row in all_rows.rows}
FINETUNINGS = {row.name: row.finetune for row in all_rows.rows}


def network(settings: Pretrain | Finetune, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(tasks, "load_weights", lambda *_: None)
    kind = "pretrain" if isinstance(settings, Pretrain) else "finetune"
    inputs = {"image_teacher": "", "video_teacher": ""} if kind == "pretrain" else {}
    stage = Stage(kind=kind, id="stage", recipe=settings, inputs=inputs)
    with torch.device("meta"):
        return tasks.build_task(stage, DATASETS[settings.dataset].classes, torch.device("meta")).model


def rising(rate: float, depth: int) -> list[float]:
    return [rate * i / (depth - 1) for i in range(depth)]


@pytest.mark.parametrize("name", PRETRAININGS)
def test_drop_path_of_every_pretraining(name, monkeypatch):
    rate = 0.2 if name.startswith("vith") else 0.1
    student = network(PRETRAININGS[name], monkeypatch)
    for blocks in (student.blocks, student.decoder_img.blocks, student.decoder_vid.blocks):
        assert drop_rates(blocks) == pytest.approx(rising(rate, len(blocks)), rel=1e-5)


@pytest.mark.parametrize("name", FINETUNINGS)
def test_drop_path_and_dropout_of_every_finetuning(name, monkeypatch):
    large = name.startswith(("vitl", "vith"))
    classifier = network(FINETUNINGS[name], monkeypatch)
    rates = rising(0.3 if large else 0.1, len(classifier.blocks))
    assert drop_rates(classifier.blocks) == pytest.approx(rates, rel=1e-5)
    assert classifier.head_dropout.p == (0.5 if large else 0.0)
    assert classifier.head.out_features == (400 if name.endswith("k400") else 174)


@pytest.mark.parametrize("build", [build_image_teacher, build_video_teacher])
def test_teachers_stored_in_bf16_have_the_features_of_autocast_bit_for_bit(build):
    torch.manual_seed(0)
    teacher = build("tiny")
    for name, weight in teacher.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)  # they start at zero
    clip = SIZES["tiny"].clip
    shape = (2, 3, 48, 48) if build is build_image_teacher else (2, 3, clip.frames, 48, 48)
    inputs = torch.randn(shape)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher(inputs)
        before = sum(weight.nbytes for weight in teacher.parameters())
        tasks.store_in_bf16(teacher)
        assert torch.equal(teacher(inputs), expected)
    assert sum(weight.nbytes for weight in teacher.parameters()) < 0.6 * before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teachers_that_have_changed_are_loaded_again(teachers, precision):
    shared = tasks.Teachers(recipe("pretrain"), teachers, precision, torch.device("cpu"))
    right = [{name: value.clone() for name, value in network.state_dict().items()} for network in shared.networks]
    assert not shared.reload()
    for network in shared.networks:
        next(network.parameters()).data.view(-1)[-1] += 1
        assert shared.reload() and not shared.reload()
    assert all(
        value.equal(expected[name])
        for network, expected in zip(shared.networks, right, strict=True)
        for name, value in network.state_dict().items()
    )
