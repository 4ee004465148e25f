import re

import pytest
import torch

from experiments import all as all_rows
from mvd.config import DATASETS, Optimization
from mvd.models import build_classifier, build_image_autoencoder, build_student
from mvd.train.optimizer import build_optimizer, parameter_groups
from tests.official import golden


def build(kind, *arguments, **options):
    with torch.device("meta"):
        return kind(*arguments, **options)


@pytest.mark.parametrize(("size", "decay"), [("base", 0.75), ("small", 0.7)])
def test_layer_decay_is_the_official_one(size, decay):
    official = golden("layer_decay_groups.json")[f"vit_{size}_{decay}"]
    groups = parameter_groups(build(build_classifier, size, num_classes=400), 0.05, layer_decay=decay)
    assert len(groups) == official["n_groups"]
    ours = {name: group for group in groups for name in group["names"]}
    assert ours.keys() == official["params"].keys()
    for name, expected in official["params"].items():
        assert ours[name]["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-12)
        assert ours[name]["weight_decay"] == (0.05 if expected["weight_decay"] else 0.0)


@pytest.mark.parametrize("row", all_rows.rows, ids=lambda row: row.name)
def test_every_finetuning_scales_its_learning_rate_by_layer(row):
    recipe = row.finetune
    decay = 0.7 if row.name in ("vits_from_vitb_ssv2", "vits_from_vitl_ssv2") else 0.75
    depth = {"small": 12, "base": 12, "large": 24, "huge": 32}[recipe.size]
    model = build(build_classifier, recipe.size, num_classes=DATASETS[recipe.dataset].classes)
    groups = parameter_groups(model, recipe.optimization.weight_decay, recipe.optimization.layer_decay)
    ours = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    expected = {}
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)", name)
        above = depth - int(block[1]) if block else depth + 1 if name.startswith("patch_embed") else 0
        expected[name] = (pytest.approx(decay**above, rel=1e-12), 0.0 if parameter.ndim == 1 else 0.05)
    assert ours == expected
    assert len(groups) == 2 * (depth + 2)


@pytest.mark.parametrize(("size", "teacher"), [("small", "base"), ("base", "base"), ("large",) * 2, ("huge",) * 2])
def test_pretraining_decays_the_official_parameters(size, teacher):
    official = golden("pretrain_weight_decay.json")[size]
    groups = parameter_groups(build(build_student, size, teacher=teacher), 0.05)
    names = {group["weight_decay"]: group["names"] for group in groups}
    assert len(groups) == 2 and all(group["lr_scale"] == 1.0 for group in groups)
    assert sorted(names[0.05]) == sorted(official["decay_params"])
    assert sorted(names[0.0]) == sorted(official["no_decay_params"])


def test_every_trainable_parameter_is_in_exactly_one_group():
    for model in (build(build_student, "tiny", teacher="tiny"), build(build_image_autoencoder, "tiny")):
        grouped = [parameter for group in parameter_groups(model, 0.05) for parameter in group["params"]]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(grouped) == len(trainable)
        assert {id(p) for p in grouped} == {id(p) for p in trainable}


def test_optimizer_takes_the_recipe():
    recipe = Optimization(
        global_batch=512,
        epochs=3,
        warmup_epochs=1,
        base_lr=1e-3,
        min_lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-6,
        layer_decay=0.5,
        micro_batch=8,
    )
    optimizer = build_optimizer(build_classifier("tiny", num_classes=8), recipe)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["head.weight"] == pytest.approx(2e-3)
    assert rates["patch_embed.proj.weight"] == pytest.approx(2e-3 * 0.5**5)
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)
