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
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths, Faults
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import start_processes
from mvd.distributed.signals import Interrupted
from mvd.files import write_json
from mvd.run import run_group, run_stage
from mvd.stage import Stage
from mvd.train import engine as engine_module
from mvd.train.group import Group, Member
from mvd.train.loop import TrainingRun
from mvd.train.shared import check_planned_together
from mvd.train.tasks import Teachers
from tests.bad_batches import break_batches
from tests.runs import again, numbers, read_result, small_stage, succeed, timeless, write_stage
from tests.train.test_engine import SHARDED

VIDEOS = 44
COUNTED = ("zero0", "zero1")  # whose teachers' passes are counted, and so are not audited before a save
ZERO = ("zero0", "zero1", "zero2", "sharded")
# Run directory -> the updates whose loss is not finite on the second process.
BAD = {
    "trio/streak": (5, 6, 7),
    "trio/hopeless": tuple(range(5, 11)),
    "together-sharded/small-sharded": (3, 4, 5),
}
# Run directory -> the update in which the second process is asked to stop: in the middle of update 2 of the large one,
# unless that has made it alone.
STOPPED = {f"together-{zero}/small-{zero}": 3 for zero in ZERO if zero != "zero1"}


def run_all(folder: Path) -> None:
    """ZeRO stage 3 comes last: it replaces torch's linear function by DeepSpeed's for the rest of the process."""
    engine_module.DS_CONFIGS = folder / "ds_configs"
    process = start_processes()
    passes = count_passes()
    note_when_saved()
    break_runs(process.rank)
    for path in sorted(folder.glob("alone/*/stage.yaml")):
        if not path.parent.name.endswith("sharded"):
            run_stage(Stage.from_yaml(path))
    if process.is_first:
        copy_to_join(folder)
    dist.barrier()
    for group in ("together-zero0", "together-zero1", "together-zero2", "trio", "rest"):
        run_one_group(folder / group, process.rank, passes)
    for name in ("small-sharded", "large-sharded"):
        run_stage(Stage.from_yaml(folder / "alone" / name))
    run_one_group(folder / "together-sharded", process.rank, passes)


def run_one_group(group: Path, rank: int, passes: list[int]) -> None:
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


def copy_to_join(folder: Path) -> None:
    """Three runs that begin together with others: of the small student, which has no checkpoint yet; of the large one,
    which was killed after update 2; and of one whose checkpoint is of another precision."""
    small, large = (
        again(read(folder, f"alone/{size}-zero0"), folder / "together-zero0") for size in ("small", "large")
    )
    shutil.rmtree(small.directory / "checkpoints")
    shutil.rmtree(large.directory / "checkpoints" / "step-00000004")
    shutil.copytree(folder / "alone" / "large-bf16" / "checkpoints", folder / "rest" / "misfit" / "checkpoints")


def count_passes() -> list[int]:
    passes, targets = [], Teachers.targets

    def counted(teachers, batch):
        passes.append(len(batch["video"]))
        return targets(teachers, batch)

    Teachers.targets = counted
    return passes


def note_when_saved() -> None:
    """Writes for each student that begins how many minutes ago its last checkpoint counts as saved."""
    start = Group.start

    def noted(group: Group, member: Member) -> None:
        start(group, member)
        minutes = (time.monotonic() - member.training.checkpoints.saved_at) / 60
        write_json(member.stage.directory / f"saved-ago-{group.process.rank}.json", round(minutes))

    Group.start = noted


def break_runs(rank: int) -> None:
    """Makes losses depend on the global random state too, some of them not finite, and stops a run."""
    build, stopped = TrainingRun.__init__, set()

    def build_drawing(run: TrainingRun, stage: Stage, *arguments, **named) -> None:
        build(run, stage, *arguments, **named)
        losses, where = run.task.losses, f"{stage.directory.parent.name}/{stage.id}"

        def drawing(engine, batch):
            number = run.update + 1
            if number == STOPPED.get(where) and rank == 1 and run.running and where not in stopped:
                stopped.add(where)
                os.kill(os.getpid(), signal.SIGUSR2)
            factor = 1.0 if number in BAD.get(where, ()) else 1 + torch.rand(())
            return {name: loss * factor for name, loss in losses(engine, batch).items()}

        run.task.losses = drawing

    def mark(run: TrainingRun) -> str | None:
        where = f"{run.stage.directory.parent.name}/{run.stage.id}"
        return "loss" if run.update + 1 in BAD.get(where, ()) and rank == 1 else None

    TrainingRun.__init__ = build_drawing
    break_batches(mark, lambda _, losses: {name: loss * math.nan for name, loss in losses.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> Path:
    folder = tmp_path_factory.mktemp("group")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})
    lines = (motion_root / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("".join(f"{line}\n" for line in lines[:VIDEOS]))
    data = DatasetPaths(root=str(motion_root), train=str(folder / "train.csv"))

    def stage(where: str, name: str, zero: str = "zero1", **how) -> Stage:
        faults = Faults(audit_every=0 if where.startswith(("alone", "together")) and zero in COUNTED else 500)
        how = {"drop_path": 0.1, "checkpoint_every": 2, "deepspeed": zero, "faults": faults, **how}
        made = small_stage("pretrain", name, folder / where, data, teachers, **how)
        write_stage(made)
        return made

    small, large = {"epochs": 1}, {"epochs": 2, "global_batch": 16, "accumulation": 4, "batch_parts": 2}
    longer = {"epochs": 2, "checkpoint_every": 4, "base_lr": 0.008}
    for zero in ZERO:
        for where in ("alone", *([] if zero == "zero0" else [f"together-{zero}"])):
            stage(where, f"small-{zero}", zero, **small)
            stage(where, f"large-{zero}", zero, **large)
    stage("trio", "streak", **longer)
    stage("trio", "hopeless", **longer)
    stage("trio", "large", **large)
    stage("alone", "without-streak", **longer)
    write_json(folder / "alone" / "without-streak" / "skipped.json", {"skipped": [5, 6, 7], "rollbacks": []})
    stage("alone", "large-bf16", precision="bf16", **large)
    for name in ("large", "other", "misfit"):
        stage("rest", name, **large)
    write_json(folder / "alone" / "small-sharded" / "skipped.json", {"skipped": [3, 4, 5], "rollbacks": []})
    for where in ("alone", "together-zero2"):  # a signal comes in the middle of this update
        write_json(folder / where / "large-zero2" / "skipped.json", {"skipped": [2], "rollbacks": []})
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
    """Under zero0, the large one joins from a checkpoint of its solo run; a signal interrupts all but zero1.

    Under zero2, the update of the large one that it interrupts is one that is skipped; under ZeRO stage 3, the small
    one has to go back then.
    """
    assert_same(runs, f"together-{zero}/{size}-{zero}", f"alone/{size}-{zero}")


def test_the_teachers_see_every_micro_batch_once(runs):
    """Ten for the small student's epoch; of the second epoch's ten, those of the large one's two updates."""
    assert json.loads((runs / "together-zero1" / "passes-0.json").read_text()) == 10 + 8


def test_a_signal_stops_both_students(runs):
    """It comes in the middle of the second update of the large one, which is made again."""
    stopped = json.loads((runs / "together-zero2" / "stopped-0.json").read_text())
    assert "small-zero2: stopped by a signal after update 3 of 5; update 3 is saved" in stopped
    assert "large-zero2: stopped by a signal after update 1 of 4; update 1 is saved" in stopped


def test_a_student_that_is_ahead_waits_for_the_other(runs):
    """The small one needs the whole first epoch, the large one, from its checkpoint on, two updates of the second."""
    assert json.loads((runs / "together-zero0" / "passes-0.json").read_text()) == 10 + 8


def test_a_bad_student_goes_back_alone(runs):
    assert_same(runs, "trio/streak", "alone/without-streak")
    assert_same(runs, "trio/large", "alone/large-zero1")
    record = json.loads((runs / "trio" / "streak" / "skipped.json").read_text())
    assert record["skipped"] == [5, 6, 7] and record["rollbacks"][0]["to"] == 4
    assert not (runs / "trio" / "large" / "faults.jsonl").exists()


def test_students_do_not_all_save_after_the_same_update(runs):
    """At the default of a checkpoint every 15 minutes, those of three students are 5 minutes apart."""
    names = ("hopeless", "large", "streak")
    assert [json.loads((runs / "trio" / name / "saved-ago-0.json").read_text()) for name in names] == [0, 5, 10]


def test_students_go_on_without_the_one_with_the_smallest_batch(runs):
    """It is complete, but their updates still consist of two of its batches each."""
    for name in ("large", "other"):
        assert_same(runs, f"rest/{name}", "alone/large-zero1")


def test_a_student_that_fails_does_not_stop_the_others(runs):
    message = json.loads((runs / "trio" / "failed-1.json").read_text())
    assert "hopeless: the loss was not finite at 3 updates in a row, the last of them update 10, again" in message
    assert not (runs / "trio" / "hopeless" / "result.json").exists()


def test_a_student_that_cannot_start_does_not_stop_the_others(runs):
    """Those of the same job are compared in test_students_go_on_without_the_one_with_the_smallest_batch."""
    for rank in (0, 1):
        message = json.loads((runs / "rest" / f"failed-{rank}.json").read_text())
        assert "misfit" in message and "bf16" in message and "large" not in message
    assert not (runs / "rest" / "misfit" / "result.json").exists()


def test_stages_that_were_not_planned_together_are_refused(runs):
    small, large = read(runs, "together-zero1/small-zero1"), read(runs, "together-zero1/large-zero1")
    check_planned_together([large, small])
    check_planned_together([large, dataclasses.replace(large, id="other")])  # the small one is complete, or cancelled
    apart = dataclasses.replace(large, execution=dataclasses.replace(large.execution, batch_parts=1))
    with pytest.raises(
        ConfigError, match="large-zero1 must have micro_batch=2, precision=fp32 and batch_parts=2 to share"
    ):
        check_planned_together([small, apart])
    sharded = dataclasses.replace(large, execution=dataclasses.replace(large.execution, deepspeed="zero3"))
    with pytest.raises(
        ConfigError, match="small-zero1 and large-zero1 must both use ZeRO stage 3, or neither, got zero1"
    ):
        check_planned_together([small, sharded])
    other = dataclasses.replace(small, id="other", recipe=dataclasses.replace(small.recipe, seed=1))
    with pytest.raises(ConfigError, match="small-zero1 and other cannot share their teachers: pretrain.seed differs"):
        check_planned_together([small, other])
