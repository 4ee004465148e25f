"""Non-finite losses and gradients, and loss spikes: what is reported, which updates are skipped, when a run ends."""

import errno
import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd.config.run_settings import Faults
from mvd.data.annotations import load_annotations
from mvd.distributed import preflight
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train import bad_updates
from mvd.train import engine as engine_module
from mvd.train.bad_updates import NonFiniteLoss
from mvd.train.loop import TrainingRun
from tests.bad_batches import break_batches
from tests.runs import UPDATES, events, numbers, read_result, small_stage, succeed, write_stage
from tests.train.test_engine import SHARDED

ZERO = ("zero0", "zero1", "zero2", "sharded")
# Stage -> the updates whose loss, or gradient, goes wrong on the second process.
STREAKS = dict.fromkeys(("streak", "streak-full"), (6, 7, 8))
LATE = {"late": (5, 6)}
BAD_LOSS = {**{f"loss-{zero}": (3,) for zero in ZERO}, **STREAKS, **LATE, "hopeless": tuple(range(6, UPDATES + 1))}
BAD_GRADIENT = {f"gradient-{zero}": (3,) for zero in ZERO}
JUMP = {"spike": (9,), "spike-back": (9,)}


def run_all(folder: Path) -> None:
    engine_module.DS_CONFIGS = folder / "ds_configs"
    bad_updates.SPIKE_MINIMUM = 4
    process = start_processes()
    build = TrainingRun.__init__
    engines: list[tuple[str, weakref.ref]] = []

    def build_broken(run: TrainingRun, stage: Stage, *arguments, **named) -> None:
        left = sum(name == stage.id and engine() is not None for name, engine in engines)
        write_json(stage.directory / f"engines-{process.rank}.json", left)
        build(run, stage, *arguments, **named)
        engines.append((stage.id, weakref.ref(run.engine)))

    def write_unless_full(path: Path, content: dict) -> None:
        if path.parent.name == "streak-full":
            preflight._write_test = fail
            fail()
        write_json(path, content)

    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def mark(run: TrainingRun) -> str | None:
        name, number = run.stage.id, run.update + 1
        if number in BAD_LOSS.get(name, ()) and process.rank == 1 and run.running and not run.running.raws:
            return "loss"
        if number in BAD_GRADIENT.get(name, ()) and process.rank == 1:
            return "gradient"
        return "jump" if number in JUMP.get(name, ()) else None

    TrainingRun.__init__, bad_updates.write_json = build_broken, write_unless_full
    write_test = preflight._write_test
    break_batches(mark, spoil)
    for path in sorted(folder.glob("*/stage.yaml")):
        stage = Stage.from_yaml(path)
        preflight._write_test = write_test
        try:
            run_stage(stage)
        except NonFiniteLoss as error:
            write_json(stage.directory / f"given-up-{process.rank}.json", str(error))


def spoil(word: str, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if word == "loss":
        return {name: loss + math.inf for name, loss in losses.items()}  # the gradient is finite
    if word == "gradient":
        return {"loss": losses["loss"] + (losses["loss"] * 0).sqrt()}  # the root of 0 has no slope
    return {name: loss * 100 for name, loss in losses.items()}


def skipping(stage: Stage, updates: list[int]) -> None:
    write_json(stage.directory / "skipped.json", {"skipped": updates, "rollbacks": []})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> Path:
    folder = tmp_path_factory.mktemp("health")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})

    def stage(name: str, zero: str = "zero1", **how) -> Stage:
        made = small_stage("video_teacher", name, folder, motion_root, deepspeed=zero, checkpoint_every=5, **how)
        write_stage(made)
        return made

    for zero in ZERO:
        stage(f"loss-{zero}", zero, epochs=1)
        stage(f"gradient-{zero}", zero, epochs=1)
        skipping(stage(f"without-3-{zero}", zero, epochs=1), [3])
    stage("undisturbed", epochs=1)
    stage("streak")
    stage("streak-full")
    stage("hopeless")
    stage("late", keep_checkpoints=9)
    skipping(stage("without-streak"), [6, 7, 8])
    stage("spike", faults=Faults(spike_factor=5.0))
    stage("spike-back", faults=Faults(spike_factor=5.0, spike_rollback=True))
    skipping(stage("without-spike"), [9])
    succeed(run_all, folder)
    return folder


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "weights.safetensors")


def faults(runs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs / name / "faults.jsonl").read_text().splitlines()]


def same(runs: Path, name: str, other: str) -> bool:
    ours, theirs = weights(runs, name), weights(runs, other)
    return all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("zero", ZERO)
def test_a_bad_update_is_left_out_on_every_process(runs, what, zero):
    assert same(runs, f"{what}-{zero}", f"without-3-{zero}")
    assert not same(runs, f"{what}-{zero}", "undisturbed")
    result = json.loads((runs / f"{what}-{zero}" / "result.json").read_text())
    assert result["skipped_updates"] == [3] and result["updates"] == UPDATES // 2


def test_a_bad_loss_names_rank_update_and_videos(runs, motion_root):
    (fault,) = faults(runs, "loss-zero1")
    assert (fault["fault"], fault["update"]) == ("non-finite", 3)
    assert "the loss is not finite at update 3 (rank 1: " in fault["message"] and "rank 0" not in fault["message"]
    stage = Stage.from_yaml(runs / "loss-zero1" / "stage.yaml")
    named = fault["message"].split("rank 1: ")[1].split(")")[0].split(", ")
    known = {entry.path for entry in load_annotations(stage.execution.data, "train", 8)}
    assert len(named) == stage.execution.micro_batch and set(named) < known


def test_a_bad_gradient_names_what_every_process_had_read(runs):
    (fault,) = faults(runs, "gradient-zero2")
    assert "the gradient is not finite at update 3 (rank 0: " in fault["message"] and "; rank 1: " in fault["message"]
    assert fault["message"].count(".mp4") == 8


def test_several_in_a_row_are_left_out_from_the_last_good_checkpoint_on(runs):
    assert same(runs, "streak", "without-streak")
    record = json.loads((runs / "streak" / "skipped.json").read_text())
    assert record["skipped"] == [6, 7, 8] and record["rollbacks"][0]["to"] == 5
    assert [fault["fault"] for fault in faults(runs, "streak")] == ["non-finite"] * 3 + ["rollback"]
    assert read_result(Stage.from_yaml(runs / "streak" / "stage.yaml"))["skipped_updates"] == [6, 7, 8]


def test_a_disk_that_is_full_when_the_run_goes_back_does_not_end_it(runs):
    assert same(runs, "streak-full", "without-streak") and not (runs / "streak-full" / "skipped.json").exists()


def test_going_back_frees_the_engine_first(runs):
    assert [json.loads((runs / "streak" / f"engines-{rank}.json").read_text()) for rank in range(2)] == [0, 0]


def test_a_second_streak_after_the_same_checkpoint_ends_the_run_with_a_verdict(runs):
    messages = [json.loads((runs / "hopeless" / f"given-up-{rank}.json").read_text()) for rank in range(2)]
    assert messages[0] == messages[1]
    assert "the loss was not finite at 3 updates in a row, the last of them update 11" in messages[0]
    assert "again after a return to the checkpoint of update 5" in messages[0]
    kept = [path.parent.name for path in (runs / "hopeless").glob("checkpoints/*/manifest.json")]
    assert kept == ["step-00000005"]


def test_a_save_that_is_due_in_a_streak_is_made_after_it(runs):
    kept = sorted(path.parent.name for path in (runs / "late").glob("checkpoints/*/manifest.json"))
    assert kept == ["step-00000007", "step-00000010", "step-00000012"]


def test_a_jump_is_marked_and_left_out_only_where_asked(runs):
    stage = Stage.from_yaml(runs / "spike" / "stage.yaml")
    marked = events(stage)
    assert marked["5_faults/loss_spike"] == [9] and marked[f"1_{stage.kind}/loss"] == list(range(1, UPDATES + 1))
    assert not same(runs, "spike", "without-spike")
    assert same(runs, "spike-back", "without-spike")
    assert [fault["fault"] for fault in faults(runs, "spike-back")] == ["spike", "rollback"]
    without = Stage.from_yaml(runs / "without-spike" / "stage.yaml")
    back = Stage.from_yaml(runs / "spike-back" / "stage.yaml")
    assert [record for record in numbers(back) if record[0] > 9] == [r for r in numbers(without) if r[0] > 9]
