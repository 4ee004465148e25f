"""Initial weights and drop-path rates of the networks: the official ranges, and the rule for every layer."""

import math
from collections.abc import Iterator

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from tests.official import golden

OFFICIAL = golden("init_and_droppath.json")


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    return build_student("base", teacher="base", drop_path=0.1)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return build_classifier("base", num_classes=400)


def layers(model: nn.Module, kind: type) -> Iterator[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    assert found
    return iter(found)


def drop_rates(blocks: nn.Module) -> list[float]:
    """The rate of each block, the same in both residual branches."""
    rates = []
    for block in blocks:
        first, second = (
            path.drop_prob if isinstance(path, DropPath) else 0.0 for path in (block.drop_path1, block.drop_path2)
        )
        assert first == second
        rates.append(first)
    return rates


def test_mask_tokens_are_cut_off_at_one_standard_deviation(student):
    for token in (student.mask_token_img, student.mask_token_vid):
        assert 0.019 < token.abs().max() <= 0.02
        assert token.std().item() == pytest.approx(OFFICIAL["mask_token_init"]["std"], rel=0.05)


def test_the_tubelet_embedding_keeps_the_default_of_a_convolution(student, classifier):
    for model in (student, classifier):
        projection = model.patch_embed.proj
        assert projection.weight.abs().max().item() == pytest.approx(OFFICIAL["patch_embed_init_maxabs"], rel=1e-3)
        assert projection.weight.std().item() == pytest.approx(OFFICIAL["patch_embed_init_std"], rel=1e-2)
        assert projection.bias.abs().max().item() == pytest.approx(OFFICIAL["patch_bias_maxabs"], rel=2e-2)


def test_every_linear_layer_of_the_student_is_xavier_uniform(student):
    bound = student.blocks[0].attn.qkv.weight.abs().max().item()
    assert bound == pytest.approx(OFFICIAL["qkv_xavier_bound"], rel=1e-4)
    for name, layer in layers(student, nn.Linear):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.999 * bound < layer.weight.abs().max() <= 1.00001 * bound, name
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name


def test_every_linear_layer_of_the_classifier_is_normal(classifier):
    official = OFFICIAL["classifier_init"]
    assert classifier.blocks[0].attn.qkv.weight.std().item() == pytest.approx(official["qkv_std"], rel=0.01)
    assert classifier.head.weight.std().item() == pytest.approx(official["head_std"], rel=0.02)
    for name, layer in layers(classifier, nn.Linear):
        deviation = 0.02 * (0.001 if name == "head" else 1)
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01), name
        assert layer.weight.abs().max() > 4 * deviation, name  # a normal distribution that is not cut off at 2


def test_biases_start_at_zero_and_norms_at_one(student, classifier):
    for model in (student, classifier):
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not name.startswith("patch_embed"):
                assert not parameter.any(), name
        for name, norm in layers(model, nn.LayerNorm):
            assert (norm.weight == 1).all() and norm.eps == OFFICIAL["classifier_init"]["eps"], name


def test_drop_path_rises_over_the_encoder_and_each_decoder(student):
    assert drop_rates(student.blocks) == pytest.approx(OFFICIAL["drop_path_encoder_base_0p1"])
    for decoder in (student.decoder_img, student.decoder_vid):
        assert drop_rates(decoder.blocks) == pytest.approx(OFFICIAL["drop_path_decoder_base_0p1"])


def test_drop_path_of_a_deeper_decoder():
    with torch.device("meta"):
        student = build_student("large", teacher="large", drop_path=0.1)
    assert drop_rates(student.decoder_vid.blocks) == pytest.approx(OFFICIAL["drop_path_decoder_large_0p1"])


def test_nothing_is_dropped_in_a_teacher():
    for teacher in (build_image_teacher("tiny"), build_video_teacher("tiny")):
        dropping = [m for m in teacher.modules() if isinstance(m, DropPath | nn.Dropout) and getattr(m, "p", 1) > 0]
        assert dropping == []
