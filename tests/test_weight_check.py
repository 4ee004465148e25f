"""A file that a stage could not start from is refused before anything is queued."""

import dataclasses
import random

import pytest
import torch
from safetensors.torch import save_file

from launch.cluster import Cluster
from launch.plan.graph import build_graph
from launch.plan.resolve import missing_settings
from launch.plan.rows import load_rows
from launch.plan.weights import notes_on_weights
from mvd.config import SIZES, ConfigError
from mvd.config.typed import parse_override
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from mvd.models.checkpoints import to_official
from mvd.train.tasks import Classification
from mvd.weight_check import check_values, check_weights, network_shapes
from mvd.weight_keys import CheckpointError, is_position_table

NETWORKS = {
    "image_teacher": build_image_teacher,
    "video_teacher": build_video_teacher,
    "pretrain": lambda size: build_classifier(size, num_classes=8),
    "finetune": lambda size: build_classifier(size, num_classes=8),
}


def classifier(classes: int = 8) -> dict[str, torch.Tensor]:
    return to_official(build_classifier("tiny", num_classes=classes))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("role", NETWORKS)
def test_the_expected_shapes_are_those_of_the_networks(role, size):
    with torch.device("meta"):
        state = NETWORKS[role](size).state_dict()
    expected = {name: tuple(weight.shape) for name, weight in state.items() if not is_position_table(name)}
    assert network_shapes(role, SIZES[size], 8) == expected


@pytest.mark.parametrize("role", NETWORKS)
@pytest.mark.parametrize("name", ["weights.pth", "older.pth", "weights.safetensors"])
def test_the_right_file_passes(role, name, tmp_path):
    state = to_official(NETWORKS[role]("tiny"))
    if name == "weights.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save({"model": state}, tmp_path / name, _use_new_zipfile_serialization=name == "weights.pth")
    found = check_weights(tmp_path / name, role, "tiny", 8)
    assert (found.missing, found.notes) == ((), ())
    check_values(tmp_path / name, found)


def test_a_student_starts_a_classifier_but_is_not_one(tmp_path):
    path = tmp_path / "student.pth"
    torch.save(to_official(build_student("tiny", teacher="tiny")), path)
    assert check_weights(path, "pretrain", "tiny", 8).missing[-1] == "head.bias"
    with pytest.raises(CheckpointError, match=r"student.pth lacks fc_norm.weight, .*give the weights of a fine-tuning"):
        check_weights(path, "finetune", "tiny", 8)


@pytest.mark.parametrize(
    ("role", "size", "classes", "message"),
    [
        ("finetune", "tiny", 5, r"head.weight is \(8, 96\) instead of \(5, 96\).*number of classes"),
        ("finetune", "base", 8, "encoder of width 96 and depth 4, but size 'base' has width 768 and depth 12"),
        ("image_teacher", "tiny", 0, "cls_token is missing"),
        ("video_teacher", "tiny", 0, "encoder.norm.weight is missing"),
    ],
)
def test_a_file_for_something_else_is_refused(role, size, classes, message, tmp_path):
    save_file(classifier(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        check_weights(tmp_path / "other.safetensors", role, size, classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weights.pth", "older.pth", "weights.safetensors"])
def test_weights_that_are_no_numbers_are_refused(name, value, dtype, tmp_path):
    path = tmp_path / name
    state = {key: tensor.to(dtype) for key, tensor in classifier().items()}
    state["blocks.2.mlp.fc2.weight"][17, 30] = value
    state["unused"] = torch.full((3,), value)
    if name == "weights.safetensors":
        save_file(state, path)
    else:
        torch.save({"step": torch.arange(3), "model": state}, path, _use_new_zipfile_serialization=name != "older.pth")
    found = check_weights(path, "finetune", "tiny", 8)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite values in blocks.2.mlp.fc2.weight; use"):
        check_values(path, found)


def test_only_the_part_of_a_storage_that_a_weight_views_counts(tmp_path):
    state = classifier()
    everything = torch.full((96, 192), float("nan"))
    everything[:, ::2] = 1.0
    state["blocks.0.attn.proj.weight"] = everything[:, ::2]
    torch.save(state, tmp_path / "views.pth")
    check_values(tmp_path / "views.pth", check_weights(tmp_path / "views.pth", "finetune", "tiny", 8))


def nodes(**settings):
    words = [parse_override(f"{key.replace('_', '.')}={value}") for key, value in settings.items()]
    return build_graph(load_rows(["demo"], words)[:1])


PROFILE = Cluster(datasets={"motion": None})


@pytest.mark.parametrize("setting", ["pretrain", "finetune"])
def test_submission_says_which_setting_gives_the_wrong_file(setting, tmp_path):
    path = tmp_path / "given.safetensors"
    state = classifier()
    del state["blocks.3.norm2.bias"]
    save_file(state, path)
    with pytest.raises(ConfigError, match=rf"^{setting}.weights: {path} does not fit.*blocks.3.norm2.bias is missing"):
        missing_settings(nodes(**{f"{setting}_weights": path}), PROFILE)
    save_file(state | {"blocks.3.norm2.bias": torch.full((96,), torch.nan)}, path)
    with pytest.raises(ConfigError, match=rf"^{setting}.weights: {path} holds NaN"):
        missing_settings(nodes(**{f"{setting}_weights": path}), PROFILE)
    save_file(state | {"blocks.3.norm2.bias": torch.ones(96)}, path)
    assert missing_settings(nodes(**{f"{setting}_weights": path}), PROFILE) == []


def test_submission_checks_the_teachers(tmp_path):
    (tmp_path / "image.pth").write_bytes(b"nothing")
    save_file(to_official(build_image_teacher("tiny")), tmp_path / "image.safetensors")
    teachers = {"mae_tiny": str(tmp_path / "image.safetensors"), "videomae_tiny": str(tmp_path / "image.safetensors")}
    profile = dataclasses.replace(PROFILE, teachers=teachers)
    plan = build_graph(load_rows(["demo"], [parse_override("teachers=checkpoint")]))
    with pytest.raises(
        ConfigError, match=r"^teachers.videomae_tiny: .*\(96, 3, 12, 12\) instead of \(96, 3, 2, 12, 12"
    ):
        missing_settings(plan, profile)
    profile.teachers["mae_tiny"] = str(tmp_path / "image.pth")
    with pytest.raises(
        ConfigError,
        match=r"^teachers.mae_tiny: .*image.pth is damaged, or neither a ",
    ):
        missing_settings(plan, profile)


def test_a_plan_says_that_the_head_of_a_classifier_of_other_classes_is_replaced(tmp_path):
    path = tmp_path / "k400.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in classifier(400).items()}}, path)
    assert notes_on_weights(nodes(pretrain_weights=path)) == [
        "pretrain.weights: taken from state_dict",
        "pretrain.weights: without the prefix module.",
        "pretrain.weights: its head for 400 classes is replaced by a new one for 8",
    ]
    with pytest.raises(ConfigError, match="number of classes"):
        missing_settings(nodes(finetune_weights=path), PROFILE)


def test_fine_tuning_starts_from_a_classifier_of_other_classes(tmp_path):
    state = classifier(400)
    save_file(state, tmp_path / "k400.safetensors")
    task = Classification(
        next(node.recipe for node in nodes() if node.kind == "finetune"), 8, str(tmp_path / "k400.safetensors")
    )
    assert task.model.head.weight.shape == (8, 96)
    assert torch.equal(task.model.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"])


@pytest.mark.parametrize("name", ["weights.pth", "older.pth", "weights.safetensors"])
def test_a_damaged_file_ends_in_one_sentence(name, tmp_path):
    path, draw = tmp_path / name, random.Random(0)
    if name == "weights.safetensors":
        save_file(classifier(), path)
    else:
        torch.save({"model": classifier()}, path, _use_new_zipfile_serialization=name != "older.pth")
    whole, refused = path.read_bytes(), []
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.choices(range(8000), k=5):  # in the header, or in the pickle
            damaged[place] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            check_values(path, check_weights(path, "finetune", "tiny", 8))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in said and "\n" not in said for said in refused)
