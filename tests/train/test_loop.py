"""The loop on two processes: what stops it, and what it reports."""

import json
from pathlib import Path

import pytest
import torch

from mvd.data.annotations import load_annotations
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train.engine import Process, full_state_dict, start_processes
from mvd.train.loop import NonFiniteLoss, TrainingRun
from mvd.train.tasks import build_task
from tests.runs import events, read_metrics, read_result, small_stage, succeed, write_stage

FAILING = 3  # the update that goes wrong
QUIET = ("image_teacher", "video_teacher")


def run_all(folder: Path) -> None:
    process = start_processes()
    for kind in QUIET:
        run_stage(Stage.from_yaml(folder / kind / "stage.yaml"))
    diverge(Stage.from_yaml(folder / "pretrain" / "stage.yaml"), process, folder)
    for name in ("zero0", "zero2"):
        break_the_gradient(Stage.from_yaml(folder / name / "stage.yaml"), process, folder)


def diverge(stage: Stage, process: Process, folder: Path) -> None:
    """Makes the loss NaN on rank 1 alone, in the second micro-batch of an update."""
    run = TrainingRun(stage, process)
    losses, take_one = run.task.losses, run._one_update
    state = {"calls": 0}

    def losses_or_nan(engine, batch):
        state["calls"] += 1
        last = state["calls"] == 2 * FAILING and process.rank == 1
        return {name: loss * float("nan") if last else loss for name, loss in losses(engine, batch).items()}

    def remember_weights(*arguments):
        state["weights"] = full_state_dict(run.engine)
        take_one(*arguments)

    run.task.losses, run._one_update = losses_or_nan, remember_weights
    message = failure(run)
    after = full_state_dict(run.engine)
    changed = [name for name in after if not after[name].equal(state["weights"][name])]
    write_json(folder / f"diverged-{process.rank}.json", {"message": message, "changed": changed})


def break_the_gradient(stage: Stage, process: Process, folder: Path) -> None:
    """Makes the gradient NaN while the loss stays what it is: the root of 0 has no slope."""
    run = TrainingRun(stage, process)
    losses = run.task.losses

    def losses_with_root(engine, batch):
        named = losses(engine, batch)
        return {"loss": named["loss"] + (named["loss"] * 0).sqrt()}

    run.task.losses = losses_with_root
    write_json(folder / f"{stage.id}-{process.rank}.json", failure(run))


def failure(run: TrainingRun) -> str:
    try:
        run.to_the_end()
    except NonFiniteLoss as error:
        return str(error)
    finally:
        run.close()
    return "none"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    for kind in QUIET:
        write_stage(small_stage(kind, kind, folder, motion_root, epochs=1, log_every=100, checkpoint_every=100))
    how = {"drop_path": 0.1, "checkpoint_every": 2, "deepspeed": "zero0"}  # ZeRO 1 to 3 would themselves skip a NaN
    write_stage(small_stage("pretrain", "pretrain", folder, motion_root, teachers, **how))
    for name in ("zero0", "zero2"):
        write_stage(small_stage("video_teacher", name, folder, motion_root, deepspeed=name, checkpoint_every=1))
    succeed(run_all, folder)
    return folder


def test_a_loss_that_is_not_finite_stops_every_process_before_the_weights_change(runs, motion_root):
    reports = [json.loads((runs / f"diverged-{rank}.json").read_text()) for rank in range(2)]
    assert [report["changed"] for report in reports] == [[], []]
    assert reports[0]["message"] == reports[1]["message"]
    message = reports[0]["message"]
    assert f"not finite at update {FAILING}" in message and "rank 1: " in message and "rank 0" not in message
    videos = message.split("rank 1: ")[1].rstrip(")").split(", ")
    stage = Stage.from_yaml(runs / "pretrain" / "stage.yaml")
    known = {entry.path for entry in load_annotations(stage.execution.data, "train", 8)}
    assert len(videos) == stage.execution.micro_batch and set(videos) < known


def test_a_diverged_run_keeps_its_curves_and_its_last_good_checkpoint(runs):
    stage = Stage.from_yaml(runs / "pretrain" / "stage.yaml")
    points = events(stage)
    required = {"loss", "image_loss", "video_loss", "lr", "weight_decay", "grad_norm"}
    required |= {"samples_per_second", "data_wait_share", "memory_gb"}
    assert required <= points.keys() and all(points[tag] == [1, 2] for tag in required)
    assert [path.parent.name for path in stage.directory.glob("checkpoints/*/manifest.json")] == ["step-00000002"]
    record = read_metrics(stage)[-1]
    assert record["loss"] == pytest.approx(record["image_loss"] + record["video_loss"], rel=1e-6)
    assert record["weight_decay"] == 0.05 and record["samples_per_second"] > 0 and 0 <= record["data_wait_share"] <= 1


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_a_gradient_that_is_not_finite_stops_every_process_before_it_is_saved(runs, name):
    messages = [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1] and "the gradient is not finite at update 1" in messages[0]
    assert not list((runs / name).glob("checkpoints/*/manifest.json"))


@pytest.mark.parametrize("kind", QUIET)
def test_a_run_shorter_than_its_reports_are_apart_reports_once(runs, kind):
    stage = Stage.from_yaml(runs / kind / "stage.yaml")
    (record,) = read_metrics(stage)
    result = read_result(stage)
    assert record["update"] == 6 and record["epoch"] == 1
    assert result["loss"] == record["loss"] > 0 and "val_top1" not in result
    assert {key: result[key] for key in ("stage", "kind", "complete", "epochs", "updates", "unreadable")} == {
        "stage": kind,
        "kind": kind,
        "complete": True,
        "epochs": 1,
        "updates": 6,
        "unreadable": [],
    }
    assert (stage.directory / result["weights"]).is_file() and result["wall_seconds"] > 0


def test_a_task_starts_from_the_seed_alone(motion_root, tmp_path):
    stage = small_stage("image_teacher", "seeded", tmp_path, motion_root)
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_task(stage, 8, torch.device("cpu")).model.state_dict())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not all(states[0][name].equal(states[2][name]) for name in states[0])
