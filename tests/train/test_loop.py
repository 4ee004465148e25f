"""Metrics and results of the loop on two processes."""

from pathlib import Path

import pytest
import torch

from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train.tasks import build_task
from tests.runs import UPDATES, events, read_metrics, read_result, small_stage, succeed, write_stage

QUIET = ("image_teacher", "video_teacher")


def run_all(folder: Path) -> None:
    for kind in (*QUIET, "pretrain"):
        run_stage(Stage.from_yaml(folder / kind / "stage.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    for kind in QUIET:
        write_stage(small_stage(kind, kind, folder, motion_root, epochs=1, log_every=100, checkpoint_every=100))
    write_stage(small_stage("pretrain", "pretrain", folder, motion_root, teachers, drop_path=0.1))
    succeed(run_all, folder)
    return folder


def test_a_run_reports_its_numbers(runs):
    stage = Stage.from_yaml(runs / "pretrain" / "stage.yaml")
    points = events(stage)
    required = {f"1_pretrain/{name}" for name in ("loss", "image_loss", "video_loss")} | {"4_schedule/grad_norm"}
    required |= {f"4_schedule/{name}" for name in ("lr", "weight_decay", "epochs_done")}
    required |= {f"3_speed/{name}" for name in ("samples_per_second", "data_wait_share", "decode_ms", "memory_gb")}
    required |= {"5_faults/unreadable", "5_faults/replaced"}
    assert required <= points.keys() and all(points[tag] == list(range(1, UPDATES + 1)) for tag in required)
    record = read_metrics(stage)[-1]
    assert record["loss"] == pytest.approx(record["image_loss"] + record["video_loss"], rel=1e-6)
    assert record["weight_decay"] == 0.05 and record["samples_per_second"] > 0 and 0 <= record["data_wait_share"] <= 1


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
