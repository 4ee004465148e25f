"""The k-NN probe and the pictures in real pre-trainings on two processes: they change nothing of the training."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvd.distributed.process import Process
from mvd.evaluation import probe
from mvd.evaluation.batch_pictures import BatchPictures
from mvd.models.encoder import VideoEncoder
from mvd.probe import encoder_of, measure, read_source
from mvd.run import run_stage
from mvd.run_directory import checkpoint_name
from mvd.stage import Stage
from tests.runs import UPDATES, again, curve, events, read_metrics, read_result, small_stage, succeed, write_stage

CASES = {
    "zero1": {"deepspeed": "zero1", "drop_path": 0.3},
    "zero3": {"deepspeed": "zero3", "drop_path": 0.3},
}


def run_in_turn(folder: Path) -> None:
    """Each stage with probe and pictures and without, in the same processes; writes the random states after each."""
    draws, copy = BatchPictures.due, probe.copy_encoder
    for path in sorted(folder.glob("*/*/stage.yaml")):
        stage = Stage.from_yaml(path)
        torch.manual_seed(5)
        np.random.seed(5)
        BatchPictures.due = draws if stage.execution.probe_every else lambda *_: False
        probe.copy_encoder = partial(_copy_and_save, copy, path.with_name("copied"))
        run_stage(stage)
        rank = torch.distributed.get_rank()
        torch.save([torch.get_rng_state(), np.random.get_state()[1]], path.with_name(f"after-{rank}.pt"))
        if stage.execution.probe_every and stage.files.weights.parent.parent.name != "no-list-run":
            places = {"final": path.parent, "middle": stage.files.checkpoints / checkpoint_name(6)}
            process = Process(rank, 2, torch.device("cpu"))
            for name, place in places.items():
                path.with_name(name).write_text(measure(place, None, process))
            last = read_source(stage.files.checkpoints / checkpoint_name(UPDATES), process)
            torch.save(encoder_of(last.weights, last.what)[0].state_dict(), path.with_name(f"read-{rank}.pt"))


def _copy_and_save(copy: Callable[..., VideoEncoder], prefix: Path, *given: Any) -> VideoEncoder:
    """Copies the encoder, and writes its weights to a file of this rank, over those of the probe before."""
    encoder = copy(*given)
    torch.save(encoder.state_dict(), f"{prefix}-{torch.distributed.get_rank()}.pt")
    return encoder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("probe")
    broken = folder / "data"
    shutil.copytree(motion_root, broken)
    victim = sorted(broken.glob("val/**/*.mp4"))[0]
    victim.write_bytes(b"broken")
    no_list = folder / "no-list"
    shutil.copytree(motion_root, no_list)
    (no_list / "val.csv").unlink()
    made: dict[str, Stage] = {}
    for name, fields in CASES.items():
        for every, kind in ((0, "plain"), (3, "probed")):
            made[f"{name}-{kind}"] = small_stage(
                "pretrain", "run", folder / f"{name}-{kind}", broken, teachers, probe_every=every, **fields
            )
    made["teacher"] = small_stage("video_teacher", "run", folder / "teacher", broken, probe_every=1)
    made["no list"] = small_stage("video_teacher", "run", folder / "no-list-run", no_list, probe_every=1)
    for stage in made.values():
        write_stage(stage)
    (folder / "printed").write_text("\n".join(succeed(run_in_turn, folder)))
    return made


@pytest.mark.parametrize("case", CASES)
def test_probe_and_pictures_leave_weights_losses_and_random_states_bit_equal(runs, case):
    plain, probed = runs[f"{case}-plain"], runs[f"{case}-probed"]
    weights = [load_file(stage.files.weights) for stage in (plain, probed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert curve(plain, "loss") == curve(probed, "loss")
    for rank in range(2):
        states = [
            torch.load(s.files.checkpoints / checkpoint_name(UPDATES) / f"rng-{rank}.pt", weights_only=False)
            for s in (plain, probed)
        ]
        after = [torch.load(s.directory / f"after-{rank}.pt", weights_only=False) for s in (plain, probed)]
        assert repr(states[0]) == repr(states[1])
        assert after[0][0].equal(after[1][0]) and (after[0][1] == after[1][1]).all()


@pytest.mark.parametrize("name", ["zero1-probed", "zero3-probed", "teacher"])
def test_students_and_video_teachers_are_probed_after_every_epoch_of_generated_data(runs, name):
    records = [record for record in read_metrics(runs[name]) if "probe/knn_top1" in record]
    assert [record["update"] for record in records] == [6, 12]
    assert all(0 <= record["probe/knn_top1"] <= 100 for record in records)
    assert events(runs[name])["probe/knn_top1"] == [6, 12]


def test_all_zero_stages_give_the_same_accuracy(runs):
    assert curve(runs["zero1-probed"], "probe/knn_top1") == curve(runs["zero3-probed"], "probe/knn_top1")


@pytest.mark.parametrize("name", ["zero1-probed", "zero3-probed", "teacher"])
@pytest.mark.parametrize("file", ["copied", "read"])
def test_the_encoder_of_the_probe_and_of_the_command_is_the_one_that_is_exported(runs, name, file):
    """The copy in the training, and what the command reads from the last checkpoint."""
    exported = load_file(runs[name].files.weights)
    for rank in range(2):
        copied = torch.load(runs[name].directory / f"{file}-{rank}.pt")
        trained = {key: value for key, value in copied.items() if key != "pos_embed"}
        prefix = "encoder." if name == "teacher" else ""
        assert len(trained) > 30 and all(value.equal(exported[prefix + key]) for key, value in trained.items())


@pytest.mark.parametrize("name", ["zero1-probed", "zero3-probed", "teacher"])
def test_the_command_gives_the_values_of_the_training_for_its_checkpoints_and_its_weights(runs, name):
    middle, final = (f"k-NN top-1 {value:.2f} % on motion" for value in curve(runs[name], "probe/knn_top1"))
    assert middle in (runs[name].directory / "middle").read_text()
    assert final in (runs[name].directory / "final").read_text()


def test_one_process_probes_the_newest_checkpoint_of_an_unfinished_zero_3_run_of_two(runs, tmp_path):
    unfinished = again(runs["zero3-probed"], tmp_path)
    command = [sys.executable, "-m", "mvd.probe", str(unfinished.directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    value = curve(runs["zero3-probed"], "probe/knn_top1")[-1]
    assert f"run, checkpoint of update {UPDATES}: k-NN top-1 {value:.2f} % on motion (12 training" in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_targets_and_predictions_are_drawn_after_the_epochs(runs, case):
    images = EventAccumulator(str(runs[f"{case}-probed"].directory)).Reload()
    drawn = images.Images("pictures/targets and predictions")
    assert [image.step for image in drawn] == [6, 12] and drawn[0].height > 6 * 96
    assert EventAccumulator(str(runs[f"{case}-plain"].directory)).Reload().Tags()["images"] == []


def test_the_slowest_process_and_its_host_are_in_the_curves(runs):
    record = read_metrics(runs["zero1-probed"])[3]
    assert record["speed/slowest_rank_seconds"] >= record["speed/median_rank_seconds"] > 0
    assert record["speed/slowest_rank"] in (0, 1)


def test_probe_every_0_turns_it_off(runs):
    assert curve(runs["zero1-plain"], "probe/knn_top1") == []


def test_unreadable_videos_are_left_out_and_counted(runs):
    assert curve(runs["teacher"], "probe/unreadable") == [1, 1]
    printed = (runs["teacher"].directory.parents[1] / "printed").read_text()
    assert "unreadable, left out of the probe: " in printed


def test_a_missing_list_is_said_once_and_the_training_goes_on(runs):
    assert read_result(runs["no list"])["complete"] and curve(runs["no list"], "probe/knn_top1") == []
    printed = (runs["no list"].directory.parents[1] / "printed").read_text()
    assert printed.count("no k-NN probe, training continues without it") == 1 and "val.csv" in printed
