"""The classifiers through timm's interface."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

import mvd.models  # noqa: F401  (registers them)
from mvd.models import build_classifier, build_student
from mvd.models.checkpoints import load_official, to_official
from mvd.models.weight_files import CheckpointError
from mvd.train.optimizer import parameter_groups
from tests.official import assert_golden, golden, golden_video, with_golden_weights

TINY = "mvd_vit_tiny_patch12_48"


def lively(num_classes: int = 8) -> torch.nn.Module:
    model = build_classifier("tiny", num_classes=num_classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_every_size_of_the_rows_is_registered(size):
    name = f"mvd_vit_{size}_patch16_224"
    assert timm.list_models("mvd_vit_*_patch16_224").count(name) == 1
    with torch.device("meta"):
        model, own = timm.create_model(name, num_classes=174), build_classifier(size, num_classes=174)
    shapes, expected = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, own))
    assert shapes == expected


@torch.no_grad()
def test_an_official_file_gives_the_official_numbers(tmp_path):
    """As the official fine-tuning with DeepSpeed writes it: under `module`, besides arguments."""
    weights = to_official(with_golden_weights(build_classifier("small", num_classes=400)))
    torch.save({"module": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "official.pth")
    model = timm.create_model(
        "mvd_vit_small_patch16_224", num_classes=400, checkpoint_path=str(tmp_path / "official.pth")
    )
    assert_golden(model.eval()(golden_video()[:1]), golden("model_classifier_small.npz"), "logits")


def files(folder, weights):
    """The same weights in every layout of a file."""
    full = {}
    for key, value in weights.items():
        if key.endswith(".q_bias"):
            attention = key.removesuffix(".q_bias")
            parts = (value, torch.zeros_like(value), weights[f"{attention}.v_bias"])
            full[f"{attention}.qkv.bias"] = torch.cat(parts)
        elif not key.endswith(".v_bias"):
            full[key] = value
    torch.save({"model": {f"encoder.{key}": value for key, value in weights.items()}}, folder / "nested.pth")
    torch.save({f"backbone.{key}": value for key, value in full.items()}, folder / "full.pth")
    save_file({**weights, "pos_embed": torch.zeros(1, 3, 5)}, folder / "table.safetensors")
    return sorted(folder.iterdir())


@torch.no_grad()
def test_files_of_every_layout_give_the_same_network(tmp_path):
    own = lively()
    expected = own(clips())
    for path in files(tmp_path, to_official(own)):
        model = timm.create_model(TINY, num_classes=8, checkpoint_path=str(path)).eval()
        assert torch.equal(model(clips()), expected), path


@torch.no_grad()
def test_timms_parts_make_up_the_network():
    model = timm.create_model(TINY, num_classes=8, drop_rate=0.5, drop_path_rate=0.1).eval()
    tokens = model.forward_features(clips())
    assert tokens.shape == (2, 128, model.num_features)
    assert torch.equal(model.forward_head(tokens), model(clips()))
    assert torch.equal(model.get_classifier()(model.forward_head(tokens, pre_logits=True)), model(clips()))
    assert model.head_dropout.p == 0.5 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@torch.no_grad()
def test_the_head_can_be_replaced_and_taken_away(tmp_path):
    save_file(to_official(lively()), tmp_path / "weights.safetensors")
    model = timm.create_model(TINY, num_classes=8, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
    model.reset_classifier(5)
    assert model(clips()).shape == (2, 5) and model.get_classifier().out_features == model.num_classes == 5
    features = model.pooled(clips())
    model.reset_classifier(0)
    assert torch.equal(model(clips()), features)
    assert timm.create_model(TINY, num_classes=0)(clips()).shape == (2, model.num_features)
    settings = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 8}
    other = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=settings, num_classes=3).eval()
    assert other(clips()).shape == (2, 3) and torch.equal(other.pooled(clips()), features)


def test_weights_without_a_head_are_refused():
    model = timm.create_model(TINY, num_classes=8)
    student = build_student("tiny", teacher="tiny")
    with pytest.raises(RuntimeError, match=r'Missing key.*"fc_norm.weight"'):
        model.load_state_dict(student.state_dict())
    assert load_official(model, student.state_dict()).missing[0] == "fc_norm.weight"
    with pytest.raises(CheckpointError, match="holds no weights"):
        model.load_state_dict({})


def test_what_the_network_cannot_be_is_refused():
    with pytest.raises(ValueError, match="in_chans=1"):
        timm.create_model(TINY, in_chans=1)
    with pytest.raises(ValueError, match="got 'max'"):
        timm.create_model(TINY).reset_classifier(3, "max")


def test_checkpointing_can_be_switched_on():
    model = timm.create_model(TINY)
    model.set_grad_checkpointing()
    assert model.blocks.activation_checkpointing


def test_timms_layer_decay_is_the_recipes():
    model = timm.create_model(TINY)
    theirs = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.75).param_groups
    ours = parameter_groups(model, 0.05, 0.75)
    name = {parameter: name for name, parameter in model.named_parameters()}
    for key in ("lr_scale", "weight_decay"):
        one, other = ({name[p]: group[key] for group in groups for p in group["params"]} for groups in (theirs, ours))
        assert one == pytest.approx(other)
