"""When checkpoints are saved, which are kept, and full disks."""

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mvd.config.run_settings import Faults
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import Process, start_processes
from mvd.distributed.signals import Interrupted, stop_requested
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train.checkpoint_policy import CheckpointPolicy, kept_updates
from mvd.train.checkpoint_writer import CheckpointWrite
from mvd.train.engine import Engine
from mvd.train.loop import TrainingRun
from tests.runs import UPDATES, curve, events, read_metrics, read_result, small_stage, succeed, write_stage

# At the saves of which updates the second process has no room for a file; it is looked at anew for each save.
FULL = {"full": [4, 6], "broken": [4, 6, 8], "full at the end": [UPDATES, UPDATES], "stopped": [UPDATES] * 100}
NO_ROOM_FOR_WEIGHTS = {"full at the end": [UPDATES]}  # in the first process
ASKED = 3  # the update after which the second process is asked for a checkpoint
STOPPED_AT = 6  # the update after which it is told to stop, while it still writes the checkpoint of update 4
SIGNALS = {("asked", ASKED): signal.SIGUSR1, ("slow", STOPPED_AT): signal.SIGUSR2}


def run_all(folder: Path) -> None:
    process = start_processes()
    break_saves(process)
    send_signals(process)
    for path in sorted(folder.glob("*/stage.yaml")):
        stage = Stage.from_yaml(path)
        try:
            run_stage(stage)
        except (RunFailed, Interrupted) as error:
            write_json(stage.directory / f"ended-{process.rank}.json", str(error))


def break_saves(process: Process) -> None:
    """Lets writes fail, as FULL says, and that of the run "slow" last until the run is told to stop."""
    write, save_weights = CheckpointWrite._write, CheckpointPolicy.save_weights

    @contextmanager
    def without_room(stage: str, update: int, full: dict[str, list[int]], rank: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        updates = full.get(stage, [])
        if updates[:1] == [update]:
            updates.pop(0)
            if process.rank == rank:  # as on a full disk, a write fails half way
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            if stage == "stopped":
                os.kill(os.getpid(), signal.SIGUSR2)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def write_or_fail(checkpoint: CheckpointWrite) -> None:
        stage = checkpoint.target.parents[1].name
        while (stage, process.rank) == ("slow", 1) and not stop_requested():
            time.sleep(0.05)
        with without_room(stage, checkpoint.update, FULL, rank=1):
            write(checkpoint)

    def save_weights_or_fail(checkpoints: CheckpointPolicy, engine: Engine, path: Path, update: int) -> bool:
        with without_room(checkpoints.stage.id, update, NO_ROOM_FOR_WEIGHTS, rank=0):
            return save_weights(checkpoints, engine, path, update)

    CheckpointWrite._write, CheckpointPolicy.save_weights = write_or_fail, save_weights_or_fail


def send_signals(process: Process) -> None:
    """During the updates of SIGNALS, the second process gets a signal."""
    train_once = TrainingRun._one_update

    def train_signalled(run: TrainingRun, *arguments) -> None:
        number = SIGNALS.get((run.stage.id, run.update + 1))
        if number is not None and process.rank == 1:
            os.kill(os.getpid(), number)
        train_once(run, *arguments)

    TrainingRun._one_update = train_signalled


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> Path:
    folder = tmp_path_factory.mktemp("keeper")

    def stage(name: str, **how) -> None:
        write_stage(small_stage("video_teacher", name, folder, motion_root, **{"checkpoint_every": 2, **how}))

    stage("undisturbed", keep_checkpoints=9)
    stage("full", keep_checkpoints=9)
    stage("broken", keep_checkpoints=9, faults=Faults(save_failures=3))
    stage("full at the end", faults=Faults(save_again_seconds=0.1))
    stage("stopped", faults=Faults(save_failures=100))
    stage("slow", checkpoint_every=4)
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
    faults = [json.loads(line) for line in (runs / "full" / "faults.jsonl").read_text().splitlines()]
    assert [(fault["fault"], fault["update"]) for fault in faults] == [("save", 4), ("save", 6)]
    assert (
        "step-00000006 cannot be written" in faults[1]["message"] and "failure 2 of 5 in a row" in faults[1]["message"]
    )
    assert "the newest good checkpoint is that of update 2" in faults[1]["message"]
    assert "File too large" in faults[1]["message"]  # the system's reason, not torch's "unexpected pos"
    assert events(stage)["5_faults/failed_saves"] == [4, 6] and curve(stage, "failed_saves") == [1, 2]


def test_a_disk_that_stays_full_ends_the_run(runs):
    messages = [json.loads((runs / "broken" / f"ended-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1] and "failure 3 of 3 in a row" in messages[0]
    assert saved(runs, "broken") == [2]
    newest = read_metrics(Stage.from_yaml(runs / "broken" / "stage.yaml"))[-2:]
    assert newest[-1]["failed_saves"] == 3 and newest[-1]["update"] == 8 <= newest[-2]["update"] <= 10


def test_a_run_that_ends_while_the_disk_is_full_waits_for_room(runs):
    faults = [json.loads(line) for line in (runs / "full at the end" / "faults.jsonl").read_text().splitlines()]
    assert [fault["update"] for fault in faults] == [UPDATES] * 3
    assert ["checkpoints" in fault["message"] for fault in faults] == [True, True, False]
    assert "weights.safetensors cannot be written" in faults[2]["message"]
    expected, weights = (load_file(runs / name / "weights.safetensors") for name in ("undisturbed", "full at the end"))
    assert all(weights[key].equal(expected[key]) for key in expected)
    assert read_result(Stage.from_yaml(runs / "full at the end" / "stage.yaml"))["complete"]


def test_a_run_that_waits_for_room_can_be_told_to_stop(runs):
    messages = [json.loads((runs / "stopped" / f"ended-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1] and "stopped by a signal after update 12 of 12; update 10 is saved" in messages[0]
    assert not (runs / "stopped" / "result.json").exists()


def test_a_run_that_is_stopped_while_it_writes_a_checkpoint_completes_it_and_saves_its_last_update(runs):
    messages = [json.loads((runs / "slow" / f"ended-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1] and "after update 6 of 12; update 6 is saved" in messages[0]
    assert saved(runs, "slow") == [4, STOPPED_AT]
    updates = [record["update"] for record in read_metrics(Stage.from_yaml(runs / "slow" / "stage.yaml"))]
    assert updates == list(range(1, STOPPED_AT + 1))  # it has trained on while it wrote


def test_a_checkpoint_is_saved_on_request(runs):
    assert saved(runs, "asked") == [ASKED, UPDATES]


def test_a_checkpoint_is_saved_when_the_last_one_is_old(runs):
    assert saved(runs, "timed") == list(range(1, UPDATES + 1))


def test_the_last_and_those_of_every_nth_epoch_are_kept(runs):
    assert saved(runs, "epochs") == [6, 12]
    assert kept_updates([2, 4, 6, 8], last=1, every=None) == {8}
    assert kept_updates([8, 2, 4, 6], last=2, every=4) == {4, 6, 8}
    assert kept_updates([], last=2, every=4) == set()
