"""Kills and damaged files: what counts as a checkpoint, and that a resumed run ends as if nothing had happened."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths, Faults
from mvd.distributed.faults import HostFault
from mvd.files import write_json
from mvd.run import run_stage
from mvd.run_directory import MANIFEST
from mvd.stage import Stage
from mvd.train import manifest as manifest_module
from mvd.train.checkpoint_writer import CheckpointWrite, write_hashed
from tests.runs import (
    UPDATES,
    again,
    call,
    events,
    numbers,
    read_metrics,
    read_result,
    small_stage,
    succeed,
    timeless,
    write_stage,
)

KILLED_AT = 8
DAMAGES = ("truncated", "flipped", "manifest", "two", "none", "all")
PLANTED = {"planted rng": "rng-1.pt", "planted optimizer": "zero_pp_rank_0_mp_rank_00_optim_states.pt"}


def run_those_without_result(folder: Path) -> None:
    """Runs the stages in turn; if one is refused, the error is written to its folder."""
    for path in sorted(folder.glob("*/*/stage.yaml")):
        stage = Stage.from_yaml(path)
        print(f"=== {path.parent.parent.name}", flush=True)
        with contextlib.suppress(SystemExit):
            try:
                run_stage(stage)
            except (ConfigError, HostFault) as error:
                write_json(path.parent / "refused.json", str(error))


def run_killed(folder: Path) -> None:
    """Runs the stage until a process is killed in the save of update 8; before its manifest, if that has failed before.

    At the first attempt the second process is killed while it writes a file in the background.
    """
    (path,) = folder.glob("killed/*/stage.yaml")
    stage = Stage.from_yaml(path)
    write, note_progress, parts = manifest_module.write_json, CheckpointWrite._note_progress, []
    first_attempt = not step(stage, KILLED_AT).exists()

    def write_or_die(path: Path, manifest: dict) -> None:
        if path.name == MANIFEST and manifest["update"] == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, manifest)

    def note_progress_or_die(checkpoint: CheckpointWrite) -> None:
        parts.append(checkpoint.update)
        if checkpoint.process.rank == 1 and parts.count(KILLED_AT) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        note_progress(checkpoint)

    if first_attempt:
        CheckpointWrite._note_progress = note_progress_or_die
    else:
        manifest_module.write_json = write_or_die
    run_stage(stage)


@pytest.fixture(scope="module")
def lists(tmp_path_factory, motion_root) -> DatasetPaths:
    """The training videos, of which the first and the last cannot be read."""
    folder = tmp_path_factory.mktemp("lists")
    lines = (motion_root / "train.csv").read_text().splitlines()
    for place in (0, -1):
        (folder / f"broken{place}.mp4").write_bytes(b"no video")
        lines[place] = f"{folder}/broken{place}.mp4 0"
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return DatasetPaths(root=str(motion_root), train=str(folder / "train.csv"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, lists) -> Stage:
    """A finished run that draws random numbers in its network, and validates after each epoch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    stage = small_stage(
        "finetune",
        "finetune",
        folder / "whole",
        lists,
        drop_path=0.3,
        head_dropout=0.3,
        checkpoint_every=4,
        keep_checkpoints=3,
        faults=Faults(unreadable_share=0.1),
    )
    write_stage(stage)
    succeed(run_those_without_result, folder)
    return stage


@pytest.fixture(scope="module")
def killed(tmp_path_factory, undisturbed) -> tuple[Stage, list[list[str]]]:
    """A run of the same stage that is killed twice, and the content of its checkpoint folders each time."""
    folder = tmp_path_factory.mktemp("killed")
    execution = dataclasses.replace(undisturbed.execution, runs=str(folder / "killed"), keep_checkpoints=1)
    stage = dataclasses.replace(undisturbed, execution=execution)
    write_stage(stage)
    left = []
    for _ in range(2):
        finished = call(run_killed, folder)
        assert finished.code == -signal.SIGKILL
        left.append(sorted(str(path.relative_to(stage.directory)) for path in stage.directory.glob("checkpoints/*/*")))
    return stage, left


def step(stage: Stage, update: int) -> Path:
    return stage.directory / "checkpoints" / f"step-{update:08d}"


def damage(stage: Stage, how: str) -> None:
    newest, before = step(stage, UPDATES), step(stage, 8)
    optimizer = next(newest.glob("zero_pp_rank_1_*"))
    if how == "truncated":
        os.truncate(optimizer, optimizer.stat().st_size - 1)
    if how == "flipped":
        content = bytearray(optimizer.read_bytes())
        content[len(content) // 2] ^= 1
        optimizer.write_bytes(content)
    if how == "manifest":
        os.truncate(newest / MANIFEST, 100)
    if how == "two":
        (newest / "rng-0.pt").unlink()
        (before / "rng-1.pt").write_bytes(b"")
    if how == "all":
        for path in stage.directory.glob("checkpoints/*/rng-1.pt"):
            path.unlink()


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(stage: Stage, name: str) -> None:
    """Puts code into a file of the newest checkpoint, with a manifest to match."""
    folder = step(stage, UPDATES)
    content = torch.load(folder / name, weights_only=False)
    manifest = manifest_module.read_manifest(folder)
    planted = {**content, "planted": Planted(stage.directory / "it-ran")}
    manifest["files"][name] = write_hashed(folder / name, planted)
    manifest_module.write_manifest(folder, manifest)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, lists, undisturbed, killed) -> tuple[dict[str, Stage], dict[str, str]]:
    """Name -> resumed run, and the output of its first process."""
    folder = tmp_path_factory.mktemp("resumed")
    stages = {"killed": again(killed[0], folder / "killed")}
    for how in DAMAGES:
        stages[how] = again(undisturbed, folder / how)
        damage(stages[how], how)
    stages["unread"] = again(undisturbed, folder / "unread")
    unread = step(stages["unread"], UPDATES) / "rng-1.pt"
    unread.unlink()
    unread.symlink_to(unread.name)  # a loop: it exists, and opening it fails
    for how, name in PLANTED.items():
        stages[how] = again(undisturbed, folder / how)
        plant(stages[how], name)
    shorter = folder / "shorter.csv"
    shorter.write_text("".join(Path(lists.train).read_text().splitlines(keepends=True)[1:]))
    stages["other list"] = again(
        undisturbed, folder / "other list", data=dataclasses.replace(lists, train=str(shorter))
    )
    stages["other precision"] = again(undisturbed, folder / "other precision", precision="bf16")
    parts = succeed(run_those_without_result, folder)[0].split("=== ")[1:]
    return stages, dict(part.split("\n", 1) for part in parts)


def test_the_newest_checkpoints_are_kept(undisturbed, killed):
    assert sorted(path.name for path in undisturbed.directory.glob("checkpoints/step-*")) == [
        f"step-{update:08d}" for update in (4, 8, 12)
    ]
    assert all("checkpoints/step-00000004/manifest.json" in left for left in killed[1])


def test_a_kill_leaves_a_checkpoint_without_manifest(killed):
    writing, before_manifest = (
        [Path(name).name for name in left if f"step-{KILLED_AT:08d}" in name] for left in killed[1]
    )
    assert any(name.endswith(".tmp") for name in writing) and "rng-1.pt" not in writing and MANIFEST not in writing
    assert {"rng-0.pt", "rng-1.pt"} < set(before_manifest) and MANIFEST not in before_manifest


def test_a_manifest_names_every_file_of_its_checkpoint(undisturbed):
    folder = step(undisturbed, UPDATES)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["update"], manifest["world_size"], manifest["zero_stage"]) == (UPDATES, 2, 1)
    assert {*manifest["files"], MANIFEST} == {path.name for path in folder.iterdir()}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest["files"].items())


@pytest.mark.parametrize("name", ["killed", *DAMAGES])
def test_a_resumed_run_ends_as_the_undisturbed_one(undisturbed, resumed, name):
    stage = resumed[0][name]
    expected, weights = (load_file(s.directory / "weights.safetensors") for s in (undisturbed, stage))
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not weights[key].equal(expected[key])] == []
    assert numbers(stage) == numbers(undisturbed)
    assert timeless(read_result(undisturbed)).items() <= read_result(stage).items()


@pytest.mark.parametrize("name", PLANTED)
def test_code_that_somebody_put_into_a_checkpoint_is_not_run(resumed, name):
    stage = resumed[0][name]
    refused = json.loads((stage.directory / "refused.json").read_text())
    assert f"{PLANTED[name]} holds code or objects that no checkpoint of this project does" in refused
    assert not (stage.directory / "it-ran").exists()


def test_the_undisturbed_run_validates_and_counts_each_update_once(undisturbed):
    records = read_metrics(undisturbed)
    assert [record["update"] for record in records if "loss" in record] == list(range(1, UPDATES + 1))
    assert [record["update"] for record in records if "val_top1" in record] == [6, 12]


def test_the_curves_of_a_killed_run_show_each_update_once(resumed):
    points = events(resumed[0]["killed"])
    assert points["1_finetune/loss"] == points["4_schedule/lr"] == list(range(1, UPDATES + 1))
    assert points["2_validation/val_top1"] == [6, 12]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("killed", ["resuming after update 4"]),
        ("truncated", ["step-00000012 is damaged (zero_pp_rank_1_", "resuming after update 8"]),
        ("flipped", ["step-00000012 is damaged (zero_pp_rank_1_", "resuming after update 8"]),
        ("manifest", ["step-00000012 is damaged (manifest.json)", "resuming after update 8"]),
        ("two", ["step-00000012 is damaged (rng-0.pt)", "step-00000008 is damaged (rng-1.pt)", "after update 4"]),
        ("none", ["resuming after update 12"]),
        ("all", ["step-00000004 is damaged (rng-1.pt)", "no good checkpoint is left", "starting from update 0"]),
    ],
)
def test_the_newest_good_checkpoint_is_used_and_the_damaged_are_named(resumed, name, said):
    printed = resumed[1][name]
    assert [text for text in said if text not in printed] == []
    assert printed.count("is damaged") == sum("is damaged" in text for text in said) or name == "all"


def test_a_disk_that_does_not_answer_condemns_no_checkpoint(resumed):
    stage = resumed[0]["unread"]
    assert "step-00000012 cannot be read (" in json.loads((stage.directory / "refused.json").read_text())
    assert (step(stage, UPDATES) / MANIFEST).exists() and not (stage.directory / "result.json").exists()


def test_what_a_cut_off_save_left_is_removed(resumed):
    stage = resumed[0]["killed"]
    assert [path.name for path in stage.directory.glob("checkpoints/step-*")] == ["step-00000012"]


def test_the_unreadable_videos_of_all_processes_and_attempts_are_named(resumed, lists):
    folder = Path(lists.train).parent
    expected = [f"{folder}/broken-1.mp4", f"{folder}/broken0.mp4"]
    for stage in resumed[0].values():
        if (stage.directory / "result.json").exists():
            assert read_result(stage)["unreadable"] == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("other precision", "was made with precision fp32 and this run has precision bf16"),
        ("other list", "was made with training list "),
    ],
)
def test_a_checkpoint_of_another_make_is_refused(resumed, name, reason):
    stage = resumed[0][name]
    assert reason in json.loads((stage.directory / "refused.json").read_text())
    assert not (stage.directory / "result.json").exists()
