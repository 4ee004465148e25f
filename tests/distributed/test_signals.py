"""Signals sent to real processes: what is saved, which processes stop, and that the result does not change."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mvd import config
from mvd.config.run_settings import DatasetPaths
from mvd.distributed.process import start_processes
from mvd.distributed.signals import Interrupted
from mvd.evaluation import multiview
from mvd.evaluation.validation import Validation
from mvd.files import write_json
from mvd.models import build_classifier
from mvd.models.checkpoints import to_official
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train.loop import TrainingRun
from tests.runs import UPDATES, numbers, read_result, small_stage, succeed, timeless, write_stage
from tests.waiting import LIMIT, wait_until

# Update -> signal, and the ranks that get it during that update, together with their loader processes.
SIGNALLED = {3: (signal.SIGUSR2, (1,)), 7: (signal.SIGTERM, (0,)), 9: (signal.SIGINT, (0, 1))}
STOPS = [3, 6, 7, 9]  # at 6, a rank gets the signal during validation


def run_interrupted(folder: Path) -> None:
    """Runs a training stage and a test to their ends, in one attempt more than there are signals."""
    process = start_processes()
    train_once, forward, stops = TrainingRun._one_update, multiview._forward, []
    look = Validation.run

    def train_signalled(run: TrainingRun, *arguments) -> None:
        number, ranks = SIGNALLED.get(run.update + 1, (None, ()))
        if process.rank in ranks and run.update + 1 not in stops:
            os.killpg(os.getpgrp(), number)
        train_once(run, *arguments)

    def forward_signalled(*arguments):
        if process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        multiview._forward = forward
        return forward(*arguments)

    def validate_signalled(*arguments):
        if process.rank == 1 and stops == [3]:
            os.kill(os.getpid(), signal.SIGUSR2)
        return look(*arguments)

    TrainingRun._one_update, multiview._forward, Validation.run = train_signalled, forward_signalled, validate_signalled
    for name in ("finetune", "test"):
        stage = Stage.from_yaml(folder / name / "stage.yaml")
        for _ in range(len(STOPS) + 1):
            try:
                run_stage(stage)
                break
            except Interrupted as stop:
                stops.append(stop.update)
    write_json(folder / f"stops-{process.rank}.json", stops)


def run_undisturbed(folder: Path) -> None:
    for name in ("finetune", "test"):
        run_stage(Stage.from_yaml(folder / name / "stage.yaml"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, motion_root) -> tuple[Path, Path]:
    """The folders in which the same two stages ran with and without signals."""
    both = tmp_path_factory.mktemp("interrupted"), tmp_path_factory.mktemp("undisturbed")
    save_file(to_official(build_classifier("tiny", num_classes=8)), both[0] / "weights.safetensors")
    for folder, function in zip(both, (run_interrupted, run_undisturbed), strict=True):
        how = {"drop_path": 0.3, "head_dropout": 0.3, "workers": 1, "checkpoint_every": 100, "log_every": 2}
        write_stage(small_stage("finetune", "finetune", folder, motion_root, **how))
        write_stage(small_test(folder, motion_root, both[0] / "weights.safetensors"))
        succeed(function, folder)
    return both


def small_test(runs: Path, data: Path, weights: Path) -> Stage:
    pattern = small_stage("finetune", "pattern", runs, data)
    recipe = {"size": "tiny", "dataset": "motion", "sampling": "dense", "stride": 1, "clips": 2}
    return dataclasses.replace(
        pattern, kind="test", id="test", recipe=config.Test(**recipe), inputs={"finetune": str(weights)}
    )


def test_a_signal_to_one_process_stops_both_after_the_same_update(folders):
    stops = [json.loads((folders[0] / f"stops-{rank}.json").read_text()) for rank in range(2)]
    assert stops == [[*STOPS, 0]] * 2


def test_an_interrupted_run_ends_as_the_undisturbed_one(folders):
    interrupted, undisturbed = (Stage.from_yaml(folder / "finetune" / "stage.yaml") for folder in folders)
    weights, expected = (load_file(stage.directory / "weights.safetensors") for stage in (interrupted, undisturbed))
    assert [name for name in expected if not weights[name].equal(expected[name])] == []
    assert numbers(interrupted) == numbers(undisturbed) and read_result(interrupted)["updates"] == UPDATES


def test_a_test_that_is_started_again_counts_every_video(folders):
    results = [json.loads((folder / "test" / "result.json").read_text()) for folder in folders]
    assert timeless(results[0]) == timeless(results[1])
    assert results[0]["videos"] == 16


def alone(stage: Stage, **execution: Any) -> Stage:
    """The same stage for one process."""
    how = dataclasses.replace(stage.execution, world_size=1, accumulation=4, **execution)
    return dataclasses.replace(stage, execution=how)


def stuck_stage(folder: Path, data: Path) -> Stage:
    """A stage that waits for its first batch forever: its videos are pipes that nobody writes to."""
    pipes = [folder / f"pipe-{number}.mp4" for number in range(8)]
    for pipe in pipes:
        os.mkfifo(pipe)
    (folder / "train.csv").write_text("".join(f"{pipe} {label}\n" for label, pipe in enumerate(pipes)))
    return small_stage("video_teacher", "stuck", folder, DatasetPaths(root=str(data), train=f"{folder}/train.csv"))


@pytest.fixture
def stuck(tmp_path, motion_root) -> Iterator[subprocess.Popen[str]]:
    """A run whose only loader process hangs while it reads a video."""
    stage = stuck_stage(tmp_path, motion_root)
    command = [sys.executable, "-m", "mvd.run", str(write_stage(alone(stage, workers=1)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        yield run
        run.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_signal_from_outside_ends_the_command_with_its_own_exit_code(tmp_path, motion_root):
    stage = small_stage(
        "video_teacher", "stopped", tmp_path, motion_root, epochs=400, schedule_epochs=400, checkpoint_every=9999
    )
    command = [sys.executable, "-m", "mvd.run", str(write_stage(alone(stage)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        wait_until((stage.directory / "metrics.jsonl").exists, run)
        run.send_signal(signal.SIGINT)
        printed, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == os.EX_TEMPFAIL, printed
    last = printed.splitlines()[-1]
    assert "stopped: stopped by a signal after update " in last and "start it again to go on" in last
    assert "Traceback" not in printed
    (folder,) = stage.directory.glob("checkpoints/step-*")
    assert (folder / "manifest.json").exists() and f"after update {int(folder.name[5:])} of 2400" in last


def test_a_second_signal_ends_a_stuck_run_at_once_and_its_loader_with_it(stuck):
    wait_until(lambda: children(stuck.pid), stuck)
    (loader,) = children(stuck.pid)
    while stuck.poll() is None:
        stuck.terminate()
        time.sleep(0.1)
    assert stuck.returncode == -signal.SIGTERM
    wait_until(lambda: not alive(loader))
