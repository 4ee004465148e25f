"""When checkpoints are saved, which are kept, and a disk that does not take them."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Faults, Stage
from mvd.train.engine import start_processes
from mvd.train.faults import FAULTS, GivenUp
from mvd.train.keeper import kept_updates
from mvd.train.loop import TrainingRun
from tests.runs import UPDATES, curve, events, read_metrics, small_stage, succeed, write_stage

FULL = {"full": (4, 6), "broken": (4, 6, 8)}  # after which updates the second process has no room for a file
ASKED = 3  # the update after which the second process is asked for a checkpoint


def run_all(folder: Path) -> None:
    process = start_processes()
    save, train_once = TrainingRun._save, TrainingRun._one_update

    def save_without_room(run: TrainingRun) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if run.update in FULL.get(run.stage.id, ()) and process.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as on a full disk, a write fails half way
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def ask(run: TrainingRun, *arguments) -> None:
        if (run.stage.id, run.update + 1, process.rank) == ("asked", ASKED, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        train_once(run, *arguments)

    TrainingRun._save, TrainingRun._one_update = save_without_room, ask
    for path in sorted(folder.glob("*/stage.yaml")):
        stage = Stage.from_yaml(path)
        try:
            run_stage(stage)
        except GivenUp as error:
            write_json(stage.directory / f"given-up-{process.rank}.json", str(error))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> Path:
    folder = tmp_path_factory.mktemp("keeper")

    def stage(name: str, **how) -> None:
        write_stage(small_stage("video_teacher", name, folder, motion_root, **{"checkpoint_every": 2, **how}))

    stage("undisturbed", keep_checkpoints=9)
    stage("full", keep_checkpoints=9)
    stage("broken", keep_checkpoints=9, faults=Faults(save_failures=3))
    stage("asked", checkpoint_every=100, checkpoint_minutes=None)
    stage("timed", checkpoint_every=100, checkpoint_minutes=1e-6, keep_checkpoints=100)
    stage("epochs", checkpoint_every=5, keep_checkpoints=1, keep_every_epochs=1)
    succeed(run_all, folder)
    return folder


def saved(runs: Path, name: str) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in runs.glob(f"{name}/checkpoints/*/manifest.json"))


def test_a_full_disk_costs_checkpoints_and_nothing_else(runs):
    assert saved(runs, "undisturbed") == [2, 4, 6, 8, 10, 12] and saved(runs, "full") == [2, 8, 10, 12]
    assert not list(runs.glob("full/checkpoints/step-0000000[46]"))  # what was written is removed to make room
    expected, weights = (load_file(runs / name / "weights.safetensors") for name in ("undisturbed", "full"))
    assert all(weights[key].equal(expected[key]) for key in expected)


def test_a_full_disk_is_shouted(runs):
    stage = Stage.from_yaml(runs / "full" / "stage.yaml")
    faults = [json.loads(line) for line in (runs / "full" / FAULTS).read_text().splitlines()]
    assert [(fault["fault"], fault["update"]) for fault in faults] == [("save", 4), ("save", 6)]
    assert (
        "step-00000006 cannot be written" in faults[1]["message"] and "failure 2 of 5 in a row" in faults[1]["message"]
    )
    assert "the newest good checkpoint is that of update 2" in faults[1]["message"]
    assert events(stage)["failed_saves"] == [4, 6] and curve(stage, "failed_saves") == [1, 2]


def test_a_disk_that_stays_full_ends_the_run(runs):
    messages = [json.loads((runs / "broken" / f"given-up-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1] and "failure 3 of 3 in a row" in messages[0]
    assert saved(runs, "broken") == [2]
    assert read_metrics(Stage.from_yaml(runs / "broken" / "stage.yaml"))[-1]["update"] == 8


def test_a_checkpoint_is_saved_on_request(runs):
    assert saved(runs, "asked") == [ASKED, UPDATES]


def test_a_checkpoint_is_saved_when_the_last_one_is_old(runs):
    assert saved(runs, "timed") == list(range(1, UPDATES + 1))


def test_the_last_and_those_of_every_nth_epoch_are_kept(runs):
    assert saved(runs, "epochs") == [6, 12]
    assert kept_updates([2, 4, 6, 8], last=1, every=None) == {8}
    assert kept_updates([8, 2, 4, 6], last=2, every=4) == {4, 6, 8}
    assert kept_updates([], last=2, every=4) == set()
