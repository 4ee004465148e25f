import argparse
import os

import pytest
import safetensors.torch
import torch

from mvd.models import (
    build_classifier,
    build_image_autoencoder,
    build_image_teacher,
    build_student,
    build_video_autoencoder,
    build_video_teacher,
)
from mvd.models.checkpoints import CheckpointError, load_official, to_official
from mvd.sizes import SIZES
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
    """All weights drawn anew, so that zeros and ones of an initialisation cannot hide a lost key."""
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


def test_student_becomes_a_classifier_as_officially():
    official = golden("finetune_checkpoint_loading.json")["small"]
    student, classifier = randomised(build_student("small", teacher="base")), build_classifier("small", num_classes=400)
    report = load_official(classifier, to_official(student))
    assert sorted(report.used) == sorted(official["used_keys"])
    assert sorted(report.missing) == sorted(official["missing"])
    assert sorted(report.ignored) == sorted(official["dropped"])
    state = classifier.state_dict()
    assert torch.equal(state["blocks.11.attn.q_bias"], student.state_dict()["blocks.11.attn.q_bias"])
    for key in ("fc_norm.weight", "fc_norm.bias", "head.bias"):
        assert stats(state[key]) == pytest.approx(official["missing_init"][key])
    assert stats(state["head.weight"])[2] == pytest.approx(official["missing_init"]["head.weight"][2], rel=0.02)


@pytest.mark.parametrize("prefix", ["encoder.", "backbone."])
def test_prefixed_encoder_goes_into_a_classifier(prefix):
    student, classifier = randomised(BUILDERS["student"]()), BUILDERS["classifier"]()
    load_official(classifier, {prefix + key: value for key, value in student.state_dict().items()})
    assert torch.equal(classifier.blocks[3].mlp.fc2.weight, student.blocks[3].mlp.fc2.weight)


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


class Hostile:
    """A pickle that would run a command when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_pickle_is_refused_without_running_it(tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    torch.save({"model": BUILDERS["classifier"]().state_dict(), "extra": Hostile(trace)}, path)
    with pytest.raises(CheckpointError, match="could run code") as caught:
        load_official(BUILDERS["classifier"](), path)
    assert not trace.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_damaged_file_is_refused(tmp_path, name):
    path = tmp_path / name
    weights = to_official(BUILDERS["classifier"]())
    torch.save(weights, path) if name.endswith("pth") else safetensors.torch.save_file(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged|no checkpoint"):
        load_official(BUILDERS["classifier"](), path)


def test_absent_file_and_empty_state_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_official(BUILDERS["classifier"](), tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_official(BUILDERS["classifier"](), {"epoch": 3})
