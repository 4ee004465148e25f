"""`python -m mvd.predict`: the same predictions from every form of weights, features, and what it refuses."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mvd.data.class_names import names_of_dataset
from mvd.evaluation import load_trained, read_protocol
from mvd.evaluation.features import encoder_features
from mvd.evaluation.protocol import describe
from mvd.export import export
from mvd.models import build_classifier, build_student, build_video_autoencoder
from mvd.models.checkpoints import to_official
from mvd.predict import main
from mvd.stage import Stage
from tests.runs import small_stage, write_stage


@pytest.fixture
def tuned(motion_root, tmp_path) -> Stage:
    """The run directory of a fine-tuning of the tiny network, with random weights."""
    torch.manual_seed(2)
    stage = small_stage("finetune", "finetune-a-0a1b2c3d", tmp_path, motion_root)
    write_stage(stage)
    model = build_classifier("tiny", num_classes=8)
    torch.nn.init.normal_(model.head.weight)
    save_file(to_official(model), stage.files.weights, describe(stage))
    return stage


@pytest.fixture
def videos(motion_root) -> list[str]:
    return [str(path) for path in sorted((motion_root / "val").glob("*.mp4"))[:2]]


def test_all_forms_of_weights_give_the_same_named_predictions(tuned, videos, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    exported = [
        export(tuned.directory, form, tmp_path / f"out{end}") for form, end in (("official", ".pth"), ("timm", ""))
    ]
    tables = []
    for source in (tuned.directory, tuned.files.weights, *exported):
        assert main([str(source), *videos, str(broken), "--csv", str(tmp_path / "out.csv")]) == 0
        printed = capsys.readouterr()
        assert f"unreadable: {broken}: its header" in printed.err and "3/3" in printed.err
        tables.append(list(csv.reader((tmp_path / "out.csv").open())))
    assert tables[0][0][3:5] == ["left", "right"] and tables[0][3][:2] == [str(broken), ""]
    assert all(table == tables[0] for table in tables)
    assert [np.isclose(sum(map(float, row[3:])), 1) for row in tables[0][1:3]] == [True, True]
    assert main([str(tuned.directory), str(broken)]) == 1


def test_files_of_others_are_described_by_their_weights(videos, tmp_path, caplog):
    for classes, assumed in ((400, "k400 are assumed"), (7, "dense sampling is assumed")):
        weights = to_official(build_classifier("tiny", num_classes=classes))
        torch.save({"module": weights, "epoch": 7}, tmp_path / "official.pth")
        assert main([str(tmp_path / "official.pth"), *videos, "--views", "1", "--stride", "1"]) == 0
        assert f"{assumed}, with stride 4 and 5 x 3 views" in caplog.messages[-1]
    protocol = read_protocol(tmp_path / "official.pth")
    assert (protocol.size, protocol.classes, protocol.names) == ("tiny", 7, None)
    torch.save(to_official(build_classifier("tiny", num_classes=174)), tmp_path / "ssv2.pth")
    protocol = read_protocol(tmp_path / "ssv2.pth")
    assert (protocol.sampling, protocol.clips) == ("segment", 2)
    assert [*protocol.names] == names_of_dataset("ssv2")


def test_views_and_stride_of_the_command_line(tuned, videos, tmp_path):
    out = tmp_path / "out.csv"
    assert main([str(tuned.directory), videos[0], "--views", "3", "--stride", "1", "--csv", str(out)]) == 0
    values = [float(value) for value in list(csv.reader(out.open()))[1][3:]]
    trained = load_trained(tuned.directory)
    views = trained.protocol.cut(videos[0])  # 5 clips x 3 crops
    with torch.no_grad():
        expected = trained.model(views[[1, 7, 13]]).double().softmax(dim=1).mean(dim=0)
    assert views.shape == (15, 3, 16, 48, 48)
    # The first, third and fifth of five clips, evenly spread, are the three clips.
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["finetune", "pretrain", "video_teacher"])
def test_features_are_those_of_the_encoder(kind, tuned, videos, tmp_path, capsys):
    torch.manual_seed(3)
    networks = {
        "pretrain": lambda: build_student("tiny", teacher="tiny"),
        "video_teacher": lambda: build_video_autoencoder("tiny"),
    }
    source = tuned.files.weights
    encoder = load_trained(source).model
    if kind in networks:
        network = networks[kind]()
        encoder = getattr(network, "encoder", network)
        source = tmp_path / "encoder.safetensors"
        save_file(to_official(network), source)
        assert main([str(source), *videos]) == 2
        assert "has no classification head; fine-tune it first, or give --features" in capsys.readouterr().err
    out = tmp_path / "features.npz"
    assert main([str(source), *videos, "--features", str(out)]) == 0
    found = np.load(out)
    assert found["videos"].tolist() == videos and found["slices"].shape == (2, 5, 8, 96)
    views = read_protocol(source).cut(videos[1])
    with torch.no_grad():
        expected = encoder_features(encoder.eval(), views).mean(dim=0)
    np.testing.assert_allclose(found["mean"][1], expected.numpy(), atol=1e-4)
    if kind != "finetune":  # a classifier has its norm after the mean
        np.testing.assert_allclose(found["slices"][1].mean(axis=(0, 1)), expected.numpy(), atol=1e-4)


def test_the_weights_of_a_video_teacher_may_have_a_wrappers_prefix(tmp_path):
    weights = to_official(build_video_autoencoder("tiny"))
    save_file(weights, tmp_path / "plain.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "wrapped.safetensors")
    plain, wrapped = (load_trained(tmp_path / f"{name}.safetensors").model for name in ("plain", "wrapped"))
    assert plain.pos_embed.equal(wrapped.pos_embed)


def test_a_file_name_that_is_not_utf8_ends_no_prediction(tuned, videos, tmp_path, capsys):
    strange = os.fsencode(tmp_path) + b"/b\xfc.mp4"
    shutil.copy(videos[0], strange)
    assert main([str(tuned.directory), os.fsdecode(strange), videos[1], "--csv", str(tmp_path / "out.csv")]) == 0
    assert "b\\udcfc.mp4" in capsys.readouterr().out
    assert len(list(csv.reader((tmp_path / "out.csv").open()))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.mp4"], "there is no file or folder"),
        (["videos", "--csv", "none/out.csv"], "/none does not exist; create it, or choose another file"),
        (["videos", "--csv", "videos"], "must be a file that can be written"),
        (["videos", "--features", "none/out.npz"], "/none does not exist"),
        (["videos", "--views", "0"], "--views must be at least 1, got 0"),
    ],
)
def test_a_bad_command_is_refused_before_anything_is_loaded(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mvd.predict.load", lambda _: pytest.fail("it was loaded"))
    assert main(["model.pth", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_damaged_weights_are_one_sentence(tuned, videos, tmp_path, capsys):
    whole = tuned.files.weights.read_bytes()
    pth = export(tuned.directory, "official", tmp_path / "whole.pth").read_bytes()
    folder = export(tuned.directory, "timm", tmp_path / "folder")
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pth").write_bytes(pth[: len(pth) // 2])
    (tmp_path / "text.pth").write_text("<html>")
    image = small_stage("image_teacher", "image_teacher-a-0a1b2c3d", tmp_path, tmp_path)
    write_stage(image)
    unfinished = small_stage("finetune", "finetune-b-0a1b2c3d", tmp_path, tmp_path)
    write_stage(unfinished)
    config = json.loads((folder / "config.json").read_text())
    del config["protocol"]["stride"]
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    for source, message in {
        "cut.safetensors": "is damaged",
        "cut.pth": "is damaged",
        "text.pth": "is damaged",
        "none.pth": "there is no file",
        "folder": "its description (protocol) is damaged (KeyError: 'stride'); export it again",
        "empty": "is neither a run directory",
        image.id: "trains an encoder of images",
        unfinished.id: "has no weights",
    }.items():
        assert main([str(tmp_path / source), *videos]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
