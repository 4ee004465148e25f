"""Weights that differ between the ranks: who is named, and what the run becomes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvd.config.run_settings import Faults
from mvd.distributed.faults import HostFault
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.run import run_group, run_stage
from mvd.stage import Stage
from mvd.train.loop import TrainingRun
from mvd.train.replicas import odd_ones
from tests.runs import read_result, small_stage, succeed, write_stage

# Stage -> how often a bit flips in a weight of the second process after update 5. Saved is after update 4.
FLIPS = {"plain": 0, "student": 1, "teacher": 1, "unseen": 1, "audited": 1, "again": 2}
SHARED = {"first": 1, "second": 0}  # the same for students that train together


def run_all(folder: Path) -> None:
    process = start_processes()
    complete = TrainingRun.complete_update
    left = FLIPS | SHARED

    def flip_first(run: TrainingRun, learning_rate: float) -> None:
        name = run.stage.id
        if run.update + 1 == 5 and left[name]:
            left[name] -= 1
            network = run.task.watched[1 if name in ("teacher", "first") else 0]
            weight = next(weight for weight in network.parameters() if weight.ndim > 1 and not weight.eq(0).any())
            if process.rank == 1:
                weight.data.view(torch.int32).flatten()[3] ^= 1 << 24
        complete(run, learning_rate)

    TrainingRun.complete_update = flip_first
    for path in sorted(folder.glob("*/stage.yaml")):
        stage = Stage.from_yaml(path)
        try:
            run_stage(stage)
        except HostFault as error:
            write_json(stage.directory / f"ended-{process.rank}.json", str(error))
    run_group([Stage.from_yaml(path) for path in sorted(folder.glob("group/*/stage.yaml"))])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("replicas")
    how: dict[str, Any] = {"world_size": 3, "micro_batch": 2, "accumulation": 1, "global_batch": 6, "epochs": 1}
    how |= {"schedule_epochs": None, "checkpoint_every": 4, "deepspeed": "zero0"}
    made = {}
    for name in FLIPS:
        # Without comparisons, an audit before a save finds it too.
        faults = Faults(
            compare_every=0 if name in ("unseen", "audited") else 2, audit_every=0 if name == "unseen" else 500
        )
        made[name] = small_stage("pretrain", name, folder, motion_root, teachers, faults=faults, **how)
        write_stage(made[name])
    for name in SHARED:
        faults = Faults(compare_every=2)
        made[name] = small_stage("pretrain", name, folder / "group", motion_root, teachers, faults=faults, **how)
        write_stage(made[name])
    succeed(run_all, folder, count=3)
    return made


def same_weights(runs, name: str) -> bool:
    ours, plain = (load_file(runs[stage].files.weights) for stage in (name, "plain"))
    return all(ours[key].equal(plain[key]) for key in plain)


@pytest.mark.parametrize(("name", "network"), [("student", "Student."), ("teacher", "ImageTeacher.")])
def test_the_run_goes_back_and_names_the_rank_that_differs(runs, name, network):
    assert same_weights(runs, name) and read_result(runs[name])["skipped_updates"] == []
    (fault,) = runs[name].files.read_faults()
    assert (fault["fault"], fault["update"], len(fault["hosts"])) == ("replicas", 6, 1)
    assert fault["message"].startswith("rank 1 on ") and f"than most ranks, first in {network}" in fault["message"]


def test_students_that_share_a_changed_teacher_all_go_back(runs):
    assert same_weights(runs, "first") and same_weights(runs, "second")
    assert runs["second"].files.read_faults() == []
    (fault,) = runs["first"].files.read_faults()
    assert (fault["fault"], fault["update"]) == ("replicas", 6) and "first in ImageTeacher." in fault["message"]


def test_an_audit_that_finds_other_losses_names_the_weights_as_the_reason(runs):
    (fault,) = runs["audited"].files.read_faults()
    assert (fault["fault"], fault["update"], len(fault["hosts"])) == ("replicas", 8, 1)
    assert fault["message"].startswith("rank 1 on ") and same_weights(runs, "audited")


def test_without_the_comparison_the_same_flip_ends_in_other_weights(runs):
    assert not same_weights(runs, "unseen") and runs["unseen"].files.read_faults() == []


def test_without_a_flip_nothing_differs(runs):
    assert runs["plain"].files.read_faults() == []


def test_a_difference_that_comes_back_ends_the_attempt(runs):
    assert not runs["again"].files.result.exists()
    said = [(runs["again"].directory / f"ended-{rank}.json").read_text() for rank in range(3)]
    assert all("rank 1 on" in text and "again after a return to update 4" in text for text in said)


def test_who_is_odd():
    assert odd_ones([7, 7, 8, 7]) == [2] and odd_ones([7, 8]) == [] and odd_ones([1, 2, 1, 2, 3]) == []
