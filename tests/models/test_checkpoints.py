import argparse

import pytest
import safetensors.torch
import torch

from mvd.config.sizes import SIZES
from mvd.models import (
    build_classifier,
    build_image_autoencoder,
    build_image_teacher,
    build_student,
    build_video_autoencoder,
    build_video_teacher,
)
from mvd.models.checkpoints import CheckpointError, LoadReport, load_official, to_official
from tests.official import golden, stats

BUILDERS = {
    "student": lambda: build_student("tiny", teacher="tiny"),
    "image_teacher": lambda: build_image_teacher("tiny"),
    "video_teacher": lambda: build_video_teacher("tiny"),
    "classifier": lambda: build_classifier("tiny", num_classes=8),
    "image_autoencoder": lambda: build_image_autoencoder("tiny"),
    "video_autoencoder": lambda: build_video_autoencoder("tiny"),
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, so that zeros and ones of the initialisation cannot hide a lost key."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.normal_()
    return model


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_round_trip_is_the_identity(build):
    first, second = randomised(build()), randomised(build())
    report = load_official(second, to_official(first))
    assert_equal_states(first.state_dict(), second.state_dict())
    assert report.missing == ()
    assert all("pos_embed" in key for key in report.ignored)


def test_to_official_is_a_copy():
    model = BUILDERS["classifier"]()
    weights = to_official(model)
    weights["head.bias"] += 1
    assert not model.head.bias.any()


def assert_as_officially(report: LoadReport, official: dict) -> None:
    assert sorted(report.used) == sorted(official["used_keys"])
    assert sorted(report.missing) == sorted(official["missing"])
    assert sorted(report.ignored) == sorted(official["dropped"])


@pytest.mark.parametrize(("size", "teacher"), [("base", "large"), ("large", "large")])
def test_a_students_keys_are_used_and_dropped_as_officially(size, teacher):
    with torch.device("meta"):
        student, classifier = build_student(size, teacher=teacher), build_classifier(size, num_classes=174)
        report = load_official(classifier, student.state_dict())
    assert_as_officially(report, golden("finetune_checkpoint_loading.json")[size])


def test_student_becomes_a_classifier_as_officially():
    official = golden("finetune_checkpoint_loading.json")["small"]
    student, classifier = randomised(build_student("small", teacher="base")), build_classifier("small", num_classes=400)
    assert_as_officially(load_official(classifier, to_official(student)), official)
    state = classifier.state_dict()
    assert torch.equal(state["blocks.11.attn.q_bias"], student.state_dict()["blocks.11.attn.q_bias"])
    for key in ("fc_norm.weight", "fc_norm.bias", "head.bias"):
        assert stats(state[key]) == pytest.approx(official["missing_init"][key])
    assert stats(state["head.weight"])[2] == pytest.approx(official["missing_init"]["head.weight"][2], rel=0.02)


def with_full_biases(weights: dict, key_bias: float) -> dict:
    """The same network in the layout of files that keep one bias for query, key and value."""
    full = dict(weights)
    for name in [name for name in weights if name.endswith(".q_bias")]:
        attention = name.removesuffix(".q_bias")
        query, value = full.pop(name), full.pop(f"{attention}.v_bias")
        full[f"{attention}.qkv.bias"] = torch.cat([query, torch.full_like(query, key_bias), value])
    return full


@pytest.mark.parametrize("key_bias", [0.0, 0.7])
@torch.no_grad()
def test_a_full_bias_is_split_and_its_key_part_changes_nothing(key_bias):
    student, loaded = randomised(BUILDERS["student"]()), BUILDERS["student"]()
    report = load_official(loaded, with_full_biases(to_official(student), key_bias))
    assert_equal_states(loaded.state_dict(), student.state_dict())
    assert ("the key part of 6 qkv biases is dropped" in str(report)) == bool(key_bias)
    assert "blocks.0.attn.qkv.bias" in report.used and report.missing == ()
    attention = student.blocks[0].attn.double()
    tokens = torch.randn(2, 7, SIZES["tiny"].encoder.width, dtype=torch.float64)
    without = attention(tokens)
    attention.k_bias.fill_(key_bias)
    torch.testing.assert_close(attention(tokens), without)


@torch.no_grad()
def test_separate_biases_go_into_an_image_teacher():
    teacher, loaded = randomised(BUILDERS["image_teacher"]()), randomised(BUILDERS["image_teacher"]())
    separate = to_official(teacher)
    for block in teacher.blocks:
        block.attn.qkv.bias.chunk(3)[1].zero_()
    for name in [name for name in separate if name.endswith(".qkv.bias")]:
        attention = name.removesuffix(".qkv.bias")
        separate[f"{attention}.q_bias"], _, separate[f"{attention}.v_bias"] = separate.pop(name).chunk(3)
    load_official(loaded, separate)
    assert_equal_states(loaded.state_dict(), teacher.state_dict())


def test_a_misshapen_full_bias_is_named():
    weights = with_full_biases(to_official(BUILDERS["classifier"]()), 0.0)
    weights["blocks.1.attn.qkv.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.bias is \(9,\) instead of \(288,\)"):
        load_official(BUILDERS["classifier"](), weights)


def test_the_report_is_one_line_that_counts_by_part():
    classifier = BUILDERS["classifier"]()
    line = str(load_official(classifier, BUILDERS["student"]().state_dict()))
    assert line.startswith("54 keys used; 45 ignored: pos_embed, mask_token_img, ")
    assert "decoder_img (17)" in line and "\n" not in line
    assert line.endswith("freshly initialised: fc_norm.weight, fc_norm.bias, head.weight, head.bias")
    assert str(load_official(classifier, to_official(classifier))) == "58 keys used; 0 ignored"


def test_a_position_table_of_another_kind_is_mentioned():
    student = BUILDERS["student"]()
    weights = to_official(student)
    assert "table" not in str(load_official(student, weights))
    weights["pos_embed_vid"] += 1
    assert "its pos_embed_vid differs from the fixed table and is ignored" in str(load_official(student, weights))


def test_weights_that_are_no_numbers_are_refused():
    weights = to_official(BUILDERS["classifier"]())
    weights["head.bias"] = weights["head.bias"].long()
    with pytest.raises(CheckpointError, match="head.bias has dtype int64"):
        load_official(BUILDERS["classifier"](), weights)


def test_half_precision_weights_are_widened():
    student, loaded = randomised(BUILDERS["student"]()), BUILDERS["student"]()
    load_official(loaded, {key: value.half() for key, value in student.state_dict().items()})
    assert loaded.norm.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.norm.weight, student.norm.weight, atol=2e-3, rtol=1e-3)


def test_trained_autoencoders_become_teachers():
    for kind in ("image", "video"):
        autoencoder, teacher = randomised(BUILDERS[f"{kind}_autoencoder"]()), BUILDERS[f"{kind}_teacher"]()
        report = load_official(teacher, to_official(autoencoder))
        trained = autoencoder.state_dict()
        assert all(torch.equal(value, trained[key]) for key, value in teacher.state_dict().items())
        assert report.missing == () and any("decoder" in key for key in report.ignored)


def test_an_image_teacher_of_another_resolution_keeps_its_own_table():
    with torch.device("meta"):
        weights = build_image_autoencoder("huge").state_dict()
        teacher = build_image_teacher("huge")
        report = load_official(teacher, weights)
    assert weights["pos_embed"].shape != teacher.pos_embed.shape
    assert "pos_embed" in report.ignored


@pytest.mark.parametrize("key", ["model", "module"])
def test_official_file_with_arguments_beside_the_weights(tmp_path, key):
    teacher, loaded = randomised(BUILDERS["video_teacher"]()), BUILDERS["video_teacher"]()
    path = tmp_path / "teacher.pth"
    torch.save({key: teacher.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 3}, path)
    load_official(loaded, path)
    assert_equal_states(loaded.state_dict(), teacher.state_dict())


def test_safetensors_file(tmp_path):
    student, loaded = randomised(BUILDERS["student"]()), BUILDERS["student"]()
    safetensors.torch.save_file(to_official(student), tmp_path / "student.safetensors")
    load_official(loaded, str(tmp_path / "student.safetensors"))
    assert_equal_states(loaded.state_dict(), student.state_dict())


def test_built_in_position_tables_win():
    student = BUILDERS["student"]()
    weights = to_official(student)
    table = weights["pos_embed"].clone()
    weights["pos_embed"] += 1
    del weights["pos_embed_img"]
    report = load_official(student, weights)
    assert torch.equal(student.pos_embed, table)
    assert set(report.ignored) == {"pos_embed", "pos_embed_vid"}


def test_missing_and_misshapen_keys_are_named_and_nothing_is_loaded():
    student = BUILDERS["student"]()
    weights = to_official(randomised(BUILDERS["student"]()))
    del weights["blocks.2.attn.v_bias"]
    weights["norm.weight"] = torch.ones(7)
    before = to_official(student)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn\.v_bias is missing, norm\.weight is \(7,\)"):
        load_official(student, weights)
    assert_equal_states(to_official(student), before)


def test_weights_of_another_size_are_refused():
    with pytest.raises(CheckpointError, match="choose a checkpoint of this network and size"):
        load_official(BUILDERS["video_teacher"](), build_student("small", teacher="base").state_dict())


def test_a_classifier_with_other_classes_is_refused():
    width = SIZES["tiny"].encoder.width
    message = rf"head\.weight is \(8, {width}\) instead of \(5, {width}\).*number of classes"
    with pytest.raises(CheckpointError, match=message):
        load_official(build_classifier("tiny", num_classes=5), BUILDERS["classifier"]().state_dict())


def test_half_a_head_is_refused():
    weights = BUILDERS["classifier"]().state_dict()
    del weights["fc_norm.bias"]
    with pytest.raises(CheckpointError, match=r"fc_norm\.bias is missing"):
        load_official(BUILDERS["classifier"](), weights)
