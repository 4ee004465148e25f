"""`python -m mvd.export`: weights out of a run directory, in forms that load back as they were."""

import resource
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mvd import config
from mvd.export import FORMATS, build_network, export, main
from mvd.models.checkpoints import load_official, to_official
from mvd.stage import Execution, Stage
from tests.runs import small_stage, write_stage

KINDS = ("image_teacher", "video_teacher", "pretrain", "finetune")


def finished(kind: str, folder: Path) -> tuple[Stage, dict[str, torch.Tensor]]:
    """A run directory of a finished stage of the tiny size, and its weights, all of them random."""
    stage = small_stage(kind, f"{kind}-some_row-0a1b2c3d", folder, folder)
    write_stage(stage)
    model = build_network(stage.recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.normal_()
    save_file(to_official(model), stage.directory / "weights.safetensors")
    return stage, model.state_dict()


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["official", "safetensors"])
def test_exporting_and_loading_back_is_the_identity(tmp_path, kind, form):
    stage, weights = finished(kind, tmp_path / "runs")
    path = export(stage.directory, form, tmp_path / f"exported{FORMATS[form].suffix}")
    loaded = build_network(stage.recipe)
    load_official(loaded, path)
    assert_equal_states(loaded.state_dict(), weights)


def test_an_exported_run_starts_another_stage_of_the_same_weights(tmp_path):
    """What leaves as a student comes in again where a run directory's own file would."""
    stage, weights = finished("pretrain", tmp_path / "runs")
    classifier = build_network(finished("finetune", tmp_path / "runs")[0].recipe)
    load_official(classifier, export(stage.directory, "official", tmp_path / "student.pth"))
    assert torch.equal(classifier.blocks[2].attn.v_bias, weights["blocks.2.attn.v_bias"])


def test_official_files_are_nested_and_say_which_stage_they_are_from(tmp_path):
    stage, weights = finished("video_teacher", tmp_path)
    content = torch.load(export(stage.directory, "official", tmp_path / "out.pth"), weights_only=True)
    assert content["stage"] == stage.id
    assert_equal_states(content["model"], weights)
    with safe_open(export(stage.directory, "safetensors", tmp_path / "out.safetensors"), "pt") as file:
        assert file.metadata()["stage"] == stage.id


def test_the_timm_folder_gives_the_same_network(tmp_path):
    stage, weights = finished("finetune", tmp_path)
    folder = export(stage.directory, "timm", tmp_path / "folder")
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_file = timm.create_model(
        "mvd_vit_tiny_patch12_48", num_classes=8, checkpoint_path=str(folder / "model.safetensors")
    )
    assert_equal_states(by_folder.state_dict(), weights)
    assert_equal_states(by_file.state_dict(), weights)
    assert sorted(path.name for path in folder.parent.glob("*folder*")) == ["folder"]


def test_the_command_ends_with_one_that_uses_the_file(tmp_path, monkeypatch, capsys):
    stage, _ = finished("finetune", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([str(stage.directory), "--to", "official"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {stage.id}.pth\n" in printed and (tmp_path / f"{stage.id}.pth").is_file()
    assert (
        "classify videos of yours:\n    " in printed and f"-m mvd.predict {tmp_path}/{stage.id}.pth VIDEOS" in printed
    )
    assert main([str(stage.directory), "--to", "timm"]) == 0
    (line,) = [line.strip() for line in capsys.readouterr().out.splitlines() if "python -c" in line]
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("RegisteredClassifier("), done.stderr


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("image_teacher", "cluster.teachers.mae_tiny="),
        ("video_teacher", "cluster.teachers.videomae_tiny="),
        ("pretrain", "pretrain.weights="),
    ],
)
def test_the_next_command_names_the_setting_that_takes_the_file(tmp_path, capsys, kind, setting):
    stage, _ = finished(kind, tmp_path)
    assert main([str(stage.directory), "--to", "safetensors", "--output", f"{tmp_path}/out.safetensors"]) == 0
    assert f" {setting}{tmp_path}/out.safetensors" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, capsys):
    stage, _ = finished("pretrain", tmp_path)
    directory, out = str(stage.directory), ["--output", f"{tmp_path}/out"]
    assert "is not a run directory (it has no stage.yaml)" in refused(capsys, str(tmp_path), "--to", "timm")
    assert "--to timm needs a classifier, but " in refused(capsys, directory, "--to", "timm", *out)
    assert "invalid choice: 'onnx'" in refused(capsys, directory, "--to", "onnx")
    assert "--to" in refused(capsys, directory)
    nowhere = ["--output", f"{tmp_path}/a/b.pth"]
    assert "/a does not exist; create it" in refused(capsys, directory, "--to", "official", *nowhere)
    (tmp_path / "out").touch()
    assert "out already exists" in refused(capsys, directory, "--to", "official", *out)
    (stage.directory / "weights.safetensors").unlink()
    assert "run it to its end" in refused(capsys, directory, "--to", "official")
    recipe = config.Test(size="tiny", dataset="motion", sampling="dense", clips=1)
    inputs = {"finetune": f"{tmp_path}/tuned/weights.safetensors"}
    test = Stage(kind="test", id="test-a", recipe=recipe, inputs=inputs, execution=Execution(runs=str(tmp_path)))
    write_stage(test)
    assert f"export the stage that it tested, {tmp_path}/tuned" in refused(capsys, str(test.directory), "--to", "timm")


def test_damaged_weights_leave_no_output(tmp_path, capsys):
    stage, weights = finished("pretrain", tmp_path)
    del weights["norm.weight"]
    save_file(weights, stage.directory / "weights.safetensors")
    output = ["--output", f"{tmp_path}/o"]
    assert "norm.weight is missing" in refused(capsys, str(stage.directory), "--to", "official", *output)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(form, tmp_path, capsys):
    stage, _ = finished("finetune", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a limit of the files' size stands for the disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        assert "cannot be written (" in refused(capsys, str(stage.directory), "--to", form, "--output", f"{tmp_path}/o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [stage.id]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m mvd.export runs/finetune-" in capsys.readouterr().out
