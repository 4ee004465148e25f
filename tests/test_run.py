"""`python -m mvd.run` as users and the launcher start it: exit codes, messages, and the run directory it leaves."""

import dataclasses
import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mvd import run as run_module
from mvd.config.run_settings import DatasetPaths
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from tests.runs import read_result, run, run_cli, small_stage, write_stage

NORM = "encoder.blocks.0.norm1.weight"


def with_norm(weights: str, norm: torch.Tensor, folder: Path) -> str:
    """A copy of a teacher's file with another norm in its first block."""
    path = folder / "changed.safetensors"
    save_file({**load_file(weights), NORM: norm}, path)
    return str(path)


def messages(output: list[str]) -> list[str]:
    """The errors that the processes printed."""
    text = "\n".join(output)
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error:")]


def main(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mvd.run", str(path)])
    return run_module.main()


def test_a_complete_stage_is_only_read(tmp_path):
    stage = small_stage("image_teacher", "done", tmp_path, tmp_path / "no such data")
    write_stage(stage)
    write_json(stage.directory / "result.json", {"complete": True, "loss": 0.5})
    assert run_stage(stage) == {"complete": True, "loss": 0.5}
    assert not dist.is_initialized()
    assert sorted(path.name for path in stage.directory.iterdir()) == ["result.json", "stage.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  mask_ratio: ", "  mask_share: ", "mask_share"),
        ("kind: image_teacher", "kind: sound_teacher", "sound_teacher"),
        ("execution:", "executions:", "execution, executions is unknown or missing"),
        ("  workers: 0", "  workers: many", "many"),
        ("  mask_ratio: 0.75", "  mask_ratio: 1.75", "and mask at least one of the 16 positions, got 1.75"),
        ("kind:", "kind: [", "is not a stage that this version can run"),
    ],
)
def test_a_stage_of_another_version_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, old, new, said):
    path = write_stage(small_stage("image_teacher", "odd", tmp_path, tmp_path))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert main(path, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_name_that_is_no_stage_is_refused_and_a_run_directory_is_accepted(tmp_path, monkeypatch, capsys):
    assert main(tmp_path / "demo", monkeypatch) == 2
    assert capsys.readouterr().err == (
        f"error: there is no file {tmp_path}/demo; give the stage.yaml of a run directory, in the runs folder\n"
    )
    stage = small_stage("image_teacher", "done", tmp_path, tmp_path)
    assert Stage.from_yaml(write_stage(stage).parent) == stage


def test_an_error_is_shown_before_anything_that_waits_for_the_other_processes(tmp_path, monkeypatch):
    def break_down(_: Stage) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(run_module, "run_stage", break_down)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("the others may not come here"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        main(write_stage(small_stage("image_teacher", "broken", tmp_path, tmp_path)), monkeypatch)


def test_a_stage_file_that_does_not_exist_is_named(tmp_path, monkeypatch, capsys):
    assert main(tmp_path / "stage.yaml", monkeypatch) == 2
    assert str(tmp_path / "stage.yaml") in capsys.readouterr().err


def test_an_error_that_a_full_disk_does_not_take_keeps_its_exit_code(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    assert main(tmp_path / "stage.yaml", monkeypatch) == 2


def test_a_missing_teacher_ends_both_processes_with_one_sentence(tmp_path, motion_root, teachers):
    inputs = {**teachers, "video_teacher": str(tmp_path / "none.safetensors")}
    stage = small_stage("pretrain", "blind", tmp_path, motion_root, inputs)
    finished = run_cli(stage, 2)
    assert finished.code == 2
    (message,) = messages(finished.output)
    assert f"blind: its video_teacher file {inputs['video_teacher']} does not exist" in message


def test_a_teacher_of_another_shape_is_refused_in_one_sentence(tmp_path, motion_root, teachers):
    odd = with_norm(teachers["video_teacher"], torch.zeros(7), tmp_path)
    stage = small_stage("pretrain", "odd", tmp_path, motion_root, {**teachers, "video_teacher": odd})
    finished = run_cli(stage, 2)
    assert finished.code == 2
    (message,) = messages(finished.output)
    assert f"{odd} does not fit" in message and f"{NORM} is (7,) instead of" in message


def test_a_teacher_whose_features_overflow_ends_the_run(tmp_path, motion_root, teachers):
    weight = load_file(teachers["video_teacher"])[NORM]
    weight[:] = 3e38  # finite, as a file's weights have to be
    broken = with_norm(teachers["video_teacher"], weight, tmp_path)
    stage = small_stage("pretrain", "broken", tmp_path, motion_root, {**teachers, "video_teacher": broken})
    finished = run_cli(stage, 2)
    assert finished.code == 2
    (message,) = messages(finished.output)
    used = [line for line in "\n".join(finished.output).splitlines() if "keys used; 0 ignored" in line]
    assert len(used) == 2  # once a start, by the first process
    assert all(line.endswith(f"rank 0 INFO {broken}: 56 keys used; 0 ignored") for line in used)
    assert (
        "the loss was not finite at 3 updates in a row, the last of them update 6, again after a return to the "
        in message
    )
    faults = [json.loads(line) for line in (stage.directory / "faults.jsonl").read_text().splitlines()]
    assert "the loss is not finite at update 1 (rank 0: " in faults[0]["message"]
    assert faults[0]["message"].count(".mp4") == stage.recipe.optimization.global_batch
    assert not (stage.directory / "weights.safetensors").exists() and not (stage.directory / "checkpoints").exists()


def test_torchrun_may_start_another_number_of_processes_than_planned(tmp_path, motion_root):
    stage = small_stage("video_teacher", "alone", tmp_path, motion_root, epochs=1, checkpoint_every=100)
    planned = dataclasses.replace(stage.execution, world_size=4, micro_batch=1, accumulation=2)
    path = write_stage(dataclasses.replace(stage, execution=planned))
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc-per-node", "1", "-m", "mvd.run", str(path)]
    finished = run(command, 1, tmp_path / "printed")
    assert finished.code == 0, finished.output
    assert " rank 0 INFO alone: attempt 1, 1 x cpu" in finished.output[0]
    (attempt,) = json.loads((stage.directory / "provenance.json").read_text())
    solved = {name: attempt["execution"][name] for name in ("world_size", "micro_batch", "accumulation")}
    assert attempt["processes"] == 1 and solved == {"world_size": 1, "micro_batch": 1, "accumulation": 8}
    assert read_result(stage)["updates"] == 6
    assert Stage.from_yaml(path).execution == planned


def test_a_run_directory_is_as_private_as_the_users_umask_says(tmp_path, motion_root):
    stage = small_stage("video_teacher", "private", tmp_path / "runs", motion_root, epochs=1)
    path = write_stage(stage)
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-m", "mvd.run", str(path)]
    assert run(command, 2, tmp_path / "printed").code == 0
    written = [entry for entry in stage.directory.rglob("*") if entry != path]
    assert len(written) > 8 and [str(entry) for entry in written if entry.stat().st_mode & 0o077] == []


@pytest.mark.parametrize(
    ("broken", "said"), [(11, "of 48 training files cannot be read"), (48, "11 consecutive files")]
)
def test_too_many_unreadable_videos_end_the_run_in_one_sentence(tmp_path, motion_root, broken, said):
    lines = (motion_root / "train.csv").read_text().splitlines()
    lines[:broken] = [f"{tmp_path}/none-{number}.mp4 0" for number in range(broken)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    data = DatasetPaths(root=str(motion_root), train=str(tmp_path / "train.csv"))
    stage = small_stage("video_teacher", "gaps", tmp_path, data, world_size=1, accumulation=4)
    finished = run_cli(stage, 1)
    assert finished.code == 2
    (message,) = messages(finished.output)
    assert said in message and "gaps: " in message
