"""Students that share their teachers: the same weights, metrics and results as if each ran alone, whatever happens.

Two processes. The list holds 44 videos: an epoch has five updates of 8, or two of 16, so that its last unit belongs to
no update of the student with the larger batch, which also trains for another epoch when the other is complete.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import start_processes
from mvd.distributed.signals import Interrupted
from mvd.files import write_json
from mvd.run import run_group, run_stage
from mvd.stage import Stage
from mvd.train import engine as engine_module
from mvd.train.bad_updates import NonFiniteLoss
from mvd.train.loop import TrainingRun
from mvd.train.shared import check_planned_together
from mvd.train.tasks import Teachers
from tests.runs import again, numbers, read_result, small_stage, succeed, timeless, write_stage
from tests.train.test_engine import SHARDED

VIDEOS = 44
ZERO = ("zero0", "zero1", "zero2", "sharded")
# Run directory -> the updates whose loss is not finite on the second process.
BAD = {"trio/streak": (5, 6, 7), "trio/hopeless": tuple(range(5, 11)), "alone/hopeless": tuple(range(5, 11))}
STOPPED_AT = 3  # the update of the small student in which the second process is asked to stop


def run_all(folder: Path) -> None:
    engine_module.DS_CONFIGS = folder / "ds_configs"
    rank = start_processes().rank
    passes = count_passes()
    break_runs(rank)
    for path in sorted(folder.glob("alone/*/stage.yaml")):
        try:
            run_stage(Stage.from_yaml(path))
        except NonFiniteLoss as error:
            write_json(path.parent / f"failed-{rank}.json", str(error))
    for group in (*sorted(folder.glob("together-*")), folder / "trio"):
        stages = [Stage.from_yaml(path) for path in sorted(group.glob("*/stage.yaml"))]
        passes.clear()
        try:
            run_group(stages)
        except Interrupted as stop:
            write_json(group / f"stopped-{rank}.json", str(stop))
            run_group(stages)
        except RunFailed as error:
            write_json(group / f"failed-{rank}.json", str(error))
        write_json(group / f"passes-{rank}.json", len(passes))


def count_passes() -> list[int]:
    passes, targets = [], Teachers.targets

    def counted(teachers, batch):
        passes.append(len(batch["video"]))
        return targets(teachers, batch)

    Teachers.targets = counted
    return passes


def break_runs(rank: int) -> None:
    """Makes losses depend on the global random state too, some of them not finite, and stops a run."""
    build, stopped = TrainingRun.__init__, []

    def build_broken(run: TrainingRun, stage: Stage, *arguments) -> None:
        build(run, stage, *arguments)
        losses, where = run.task.losses, f"{stage.directory.parent.name}/{stage.id}"

        def broken(engine, batch):
            number = run.update + 1
            if where == "together-stopped/small" and number == STOPPED_AT and rank == 1 and not stopped:
                stopped.append(number)
                os.kill(os.getpid(), signal.SIGUSR2)
            factor = math.nan if number in BAD.get(where, ()) and rank == 1 else 1 + torch.rand(())
            return {name: loss * factor for name, loss in losses(engine, batch).items()}

        run.task.losses = broken

    TrainingRun.__init__ = build_broken


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> Path:
    folder = tmp_path_factory.mktemp("group")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})
    lines = (motion_root / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("".join(f"{line}\n" for line in lines[:VIDEOS]))
    data = DatasetPaths(root=str(motion_root), train=str(folder / "train.csv"))

    def stage(where: str, name: str, zero: str = "zero1", **how) -> Stage:
        how = {"drop_path": 0.1, "checkpoint_every": 2, "deepspeed": zero, **how}
        made = small_stage("pretrain", name, folder / where, data, teachers, **how)
        write_stage(made)
        return made

    small, large = {"epochs": 1}, {"epochs": 2, "global_batch": 16, "accumulation": 4, "batch_parts": 2}
    longer = {"epochs": 2, "checkpoint_every": 4, "base_lr": 0.008}
    for zero in ZERO:
        for where in ("alone", f"together-{zero}"):
            suffix = f"-{zero}" if where == "alone" else ""
            stage(where, f"small{suffix}", zero, **small)
            stage(where, f"large{suffix}", zero, **large)
    for name, how in (("small", small), ("large", large)):
        stage("together-stopped", name, **how)
    stage("trio", "streak", **longer)
    stage("trio", "hopeless", **longer)
    stage("trio", "large", **large)
    for name in ("without-streak", "hopeless"):
        stage("alone", name, **longer)
    write_json(folder / "alone" / "without-streak" / "skipped.json", {"skipped": [5, 6, 7], "rollbacks": []})
    succeed(run_all, folder)
    return folder


def read(runs: Path, where: str) -> Stage:
    return Stage.from_yaml(runs / where / "stage.yaml")


def assert_same(runs: Path, company: str, alone: str) -> None:
    """Weights, metrics and result of a student in company and alone."""
    ours, theirs = (load_file(runs / where / "weights.safetensors") for where in (company, alone))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    one, other = read(runs, company), read(runs, alone)
    assert numbers(one) == numbers(other) and len(numbers(one)) >= 4
    assert {**timeless(read_result(one)), "stage": ""} == {**timeless(read_result(other)), "stage": ""}


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_student_is_the_same_alone_and_in_company(runs, zero, size):
    assert_same(runs, f"together-{zero}/{size}", f"alone/{size}-{zero}")


def test_the_teachers_see_every_micro_batch_once(runs):
    """Ten for the small student's epoch; of the second epoch's ten, those of the large one's two updates."""
    assert json.loads((runs / "together-zero1" / "passes-0.json").read_text()) == 10 + 8


@pytest.mark.parametrize("size", ["small", "large"])
def test_an_interruption_changes_nothing(runs, size):
    """The signal comes in the middle of the second update of the large student, which is made again."""
    stopped = json.loads((runs / "together-stopped" / "stopped-0.json").read_text())
    assert "small: stopped by a signal after update 3 of 5; update 3 is saved" in stopped
    assert "large: stopped by a signal after update 1 of 4; update 1 is saved" in stopped
    assert_same(runs, f"together-stopped/{size}", f"alone/{size}-zero1")


def test_a_bad_student_goes_back_alone(runs):
    assert_same(runs, "trio/streak", "alone/without-streak")
    assert_same(runs, "trio/large", "alone/large-zero1")
    record = json.loads((runs / "trio" / "streak" / "skipped.json").read_text())
    assert record["skipped"] == [5, 6, 7] and record["rollbacks"][0]["to"] == 4
    assert not (runs / "trio" / "large" / "faults.jsonl").exists()


def test_a_student_that_fails_does_not_stop_the_others(runs):
    message = json.loads((runs / "trio" / "failed-1.json").read_text())
    assert message == json.loads((runs / "alone" / "hopeless" / "failed-0.json").read_text()).replace(
        "/alone/", "/trio/"
    )
    assert "hopeless: the loss was not finite at 3 updates in a row" in message
    assert not (runs / "trio" / "hopeless" / "result.json").exists()


def resume(folder: Path) -> None:
    run_group([Stage.from_yaml(path) for path in sorted(folder.glob("*/stage.yaml"))])


def test_a_student_joins_from_a_checkpoint_of_its_solo_run(runs, tmp_path):
    """It is ahead, and waits for the other, which starts from scratch."""
    for name in ("small-zero1", "large-zero1"):
        copied = again(read(runs, f"alone/{name}"), tmp_path)
        newest = sorted((copied.directory / "checkpoints").iterdir())
        for folder in newest if name.startswith("small") else newest[-1:]:
            shutil.rmtree(folder)
    left = sorted(path.name for path in tmp_path.glob("*/checkpoints/*"))
    succeed(break_and_resume, tmp_path)
    for name in ("small-zero1", "large-zero1"):
        ours, theirs = (load_file(root / name / "weights.safetensors") for root in (tmp_path, runs / "alone"))
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert left == ["step-00000002"]


def break_and_resume(folder: Path) -> None:
    break_runs(start_processes().rank)
    resume(folder)


def test_stages_that_were_not_planned_together_are_refused(runs):
    small, large = read(runs, "together-zero1/small"), read(runs, "together-zero1/large")
    check_planned_together([large, small])
    apart = dataclasses.replace(large, execution=dataclasses.replace(large.execution, batch_parts=1))
    with pytest.raises(ConfigError, match="large must have micro_batch=2, precision=fp32 and batch_parts=2 to share"):
        check_planned_together([small, apart])
    other = dataclasses.replace(small, id="other", recipe=dataclasses.replace(small.recipe, seed=1))
    with pytest.raises(ConfigError, match="small and other cannot share their teachers: pretrain.seed differs"):
        check_planned_together([small, other])


def solo_only(folder: Path) -> None:
    break_runs(start_processes().rank)
    for path in sorted(folder.glob("*/stage.yaml")):
        run_stage(Stage.from_yaml(path))
