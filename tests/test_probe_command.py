"""python -m mvd.probe: which videos and which encoder it takes, and its errors."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mvd.config import SIZES, ConfigError, Dataset
from mvd.evaluation.features import copy_encoder, encoder_features
from mvd.models import build_classifier, build_student, build_video_autoencoder
from mvd.models.checkpoints import to_official
from mvd.probe import encoder_of, find_videos, main
from tests.runs import small_stage, write_stage

CLIPS = torch.randn(2, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "build", [lambda: build_student("tiny", teacher="tiny"), lambda: build_video_autoencoder("tiny")]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_encoder_of_a_file_gives_the_features_of_the_network(build, prefix):
    network = build()
    encoder, size = encoder_of({prefix + name: value for name, value in to_official(network).items()}, "a file")
    expected = encoder_features(copy_encoder(network, SIZES["tiny"], torch.device("cpu")), CLIPS)
    assert size == "tiny" and torch.equal(encoder_features(encoder, CLIPS), expected)


def test_a_classifier_of_any_number_of_classes_is_probed_after_its_norm():
    network = build_classifier("tiny", num_classes=5).eval()
    encoder, _ = encoder_of(to_official(network), "a file")
    assert torch.equal(encoder_features(encoder, CLIPS), network.pooled(CLIPS))


def test_weights_of_another_network_are_refused():
    with pytest.raises(ConfigError, match="a file holds no video encoder of a size that this version has"):
        encoder_of({"fc.weight": torch.zeros(3, 3)}, "a file")


@pytest.fixture
def own(tmp_path) -> Path:
    """A data set with lists of six and three videos that need not exist."""
    for split, count in (("train", 6), ("val", 3)):
        lines = [f"{split}-{number}.mp4 {number % 3}\n" for number in range(count)]
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{split}.csv").write_text("".join(lines))
    return tmp_path / "own"


def test_the_videos_are_those_of_the_fine_tuning_that_starts_from_the_run(tmp_path, motion_root, own):
    runs = tmp_path / "runs"
    stage = small_stage("pretrain", "pretrain-a", runs, motion_root)
    assert find_videos(stage, None).name == "motion" and len(find_videos(stage, None).train) == 48
    weights = {"pretrain": f"elsewhere/{stage.id}/weights.safetensors"}
    mine = Dataset(classes=3, train_samples=6, val_samples=3)
    tuned = small_stage("finetune", "finetune-a", runs, own, weights, dataset="mine", own_dataset=mine)
    write_stage(dataclasses.replace(tuned, recipe=dataclasses.replace(tuned.recipe, sampling="segment")))
    write_stage(small_stage("finetune", "finetune-b", runs, motion_root, {"pretrain": "x/another/weights.safetensors"}))
    found = find_videos(stage, None)
    assert (found.name, len(found.train), len(found.val), found.sampling) == ("mine", 6, 3, "segment")
    assert find_videos(stage, motion_root).name == str(motion_root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file or folder"),
        ("folder", "is not a file of weights, a run directory (with stage.yaml) or a checkpoint of one"),
        ("image_teacher", "trains no video encoder"),
        ("pretrain", "has no good checkpoint yet"),
    ],
)
def test_what_cannot_be_probed_ends_with_one_sentence(tmp_path, motion_root, capsys, monkeypatch, content, message):
    monkeypatch.setattr("mvd.probe.start_processes", lambda: None)
    if content == "folder":
        (tmp_path / "run").mkdir()
    elif content is not None:
        write_stage(small_stage(content, "run", tmp_path, motion_root))
    assert main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
