"""A second evaluator, writer and stateful part: each works in a real run and changes nothing else of it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mvd.distributed.process import Process
from mvd.evaluation import evaluator
from mvd.evaluation.batch_pictures import BatchPictures
from mvd.evaluation.validation import Validation
from mvd.monitoring import metrics, writers
from mvd.run import run_stage
from mvd.run_directory import checkpoint_name
from mvd.stage import Stage
from mvd.train import loop
from mvd.train.stateful import Stateful
from tests.runs import UPDATES, again, curve, read_metrics, read_result, small_stage, succeed, write_stage

SAVED = 6


class LogitNorm:
    """An evaluator with another interval than validation, which draws random numbers besides."""

    name, metric, every_epochs = "norm of the logits", "validation/logit_norm", 1

    @torch.no_grad()
    def run(self, network: nn.Module) -> dict[str, float]:
        torch.rand(100)
        network.eval()
        return {self.metric: float(network(torch.ones(1, 3, 16, 48, 48)).norm())}


class Recorder:
    """A writer with a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        self.handle = self.path.open("a")

    def scalars(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self._write("scalars", update, sorted(values))

    def image(self, update: int, name: str, pixels: Any) -> None: ...

    def text(self, update: int, name: str, markdown: str) -> None:
        self._write("text", update, name)

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        self._write("hyperparameters", 0, dict(values))

    def _write(self, kind: str, update: int, content: Any) -> None:
        print(json.dumps([kind, update, content]), file=self.handle)

    def flush(self) -> None:
        self.handle.flush()

    def close(self) -> None:
        self.handle.close()


class Broken(Recorder):
    """A writer whose disk is full from the start."""

    def open(self) -> None:
        raise OSError(28, "No space left on device")


class Count:
    """A part with a number and a tensor to save."""

    def __init__(self) -> None:
        self.updates, self.by_update = 0, torch.zeros(UPDATES)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "by_update": self.by_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.by_update = state["updates"], state["by_update"]


class CountingRun(loop.TrainingRun):
    """A training run with one more part in its checkpoints."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.count = Count()
        super().__init__(stage, process)
        self.made_here = 0

    def stateful(self) -> dict[str, Stateful]:
        return super().stateful() | {"count": self.count}

    def _one_update(self, learning_rate: float) -> None:
        super()._one_update(learning_rate)
        self.made_here += 1
        self.count.updates += 1
        self.count.by_update[self.update] += self.update + 1

    def close(self) -> None:
        super().close()
        seen = {"here": self.made_here, "all": self.count.updates, "by_update": self.count.by_update.tolist()}
        (self.stage.directory / f"count-{self.process.rank}.json").write_text(json.dumps(seen))


def run_extended(folder: Path) -> None:
    own_evaluators, own_writers = evaluator.build_evaluators, writers.build_writers
    loop.build_evaluators = lambda stage, process: [*own_evaluators(stage, process), LogitNorm()]
    metrics.build_writers = lambda stage, resumed_at: [
        Broken(stage.directory / "broken"),
        *own_writers(stage, resumed_at),
        Recorder(stage.directory / "recorded"),
    ]
    loop.TrainingRun = CountingRun
    run_stage(Stage.from_yaml(folder / "finetune" / "stage.yaml"))


def run_plain_and_extended(folder: Path) -> None:
    """The plain run has no pictures: those of its clips are not due, and those of its mistakes fail."""
    due, mistakes = BatchPictures.due, Validation._mistakes
    BatchPictures.due = lambda *_: False
    Validation._mistakes = lambda *_: 1 / 0
    run_stage(Stage.from_yaml(folder / "plain" / "finetune" / "stage.yaml"))
    BatchPictures.due, Validation._mistakes = due, mistakes
    run_extended(folder / "extended")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("extension")
    made: dict[str, Any] = {}
    for name in ("plain", "extended"):
        made[name] = small_stage(
            "finetune", "finetune", folder / name, motion_root, drop_path=0.3, head_dropout=0.3, validate_every=2
        )
        write_stage(made[name])
    made["printed"] = succeed(run_plain_and_extended, folder)
    return made


def test_a_second_evaluator_reports_at_its_own_interval(runs):
    record = {r["update"]: r for r in read_metrics(runs["extended"]) if LogitNorm.metric in r}
    assert list(record) == [6, 12] and all(r[LogitNorm.metric] > 0 for r in record.values())
    assert [r["update"] for r in read_metrics(runs["extended"]) if "val_top1" in r] == [12]


def test_pictures_of_mixed_clips_and_mistakes_reach_tensorboard(runs):
    found = EventAccumulator(str(runs["extended"].directory)).Reload()
    assert [image.step for image in found.Images("pictures/augmented and mixed clips")] == [6, 12]
    assert [image.step for image in found.Images("pictures/surest mistakes")] == [12]
    assert curve(runs["extended"], "val_loss")[0] > 0


def test_a_picture_that_fails_is_one_warning_and_the_run_goes_on(runs):
    assert read_result(runs["plain"])["complete"]
    warned = [line for line in runs["printed"][0].splitlines() if "no pictures of validation videos" in line]
    assert len(warned) == 1 and "ZeroDivisionError" in warned[0]


def test_more_evaluators_writers_parts_and_pictures_leave_the_weights_bit_equal(runs):
    plain, extended = (load_file(runs[name].directory / "weights.safetensors") for name in ("plain", "extended"))
    assert plain.keys() == extended.keys() and all(plain[name].equal(extended[name]) for name in plain)
    assert curve(runs["plain"], "loss") == curve(runs["extended"], "loss")


def test_a_second_writer_gets_what_the_others_get(runs):
    lines = [json.loads(line) for line in (runs["extended"].directory / "recorded").read_text().splitlines()]
    (settings,) = [content for kind, _, content in lines if kind == "hyperparameters"]
    assert settings["kind"] == "finetune" and settings["optimization.base_lr"] == 0.016
    assert [(update, content) for kind, update, content in lines if kind == "text"] == [
        (0, "1_recipe"),
        (0, "3_execution"),
        (0, "4_hosts"),
    ]
    assert [update for kind, update, content in lines if kind == "scalars" and "loss" in content] == list(
        range(1, UPDATES + 1)
    )


def test_a_writer_whose_disk_is_full_stops_neither_the_run_nor_the_other_writers(runs):
    assert read_result(runs["extended"])["complete"]
    outages = [line for line in runs["printed"][0].splitlines() if "FAULT (log): Broken" in line]
    assert len(outages) == 1 and "No space left on device" in outages[0]


def test_a_second_part_comes_back_from_a_checkpoint(runs, tmp_path):
    resumed = again(runs["extended"], tmp_path)
    shutil.rmtree(resumed.files.checkpoints / checkpoint_name(UPDATES))
    assert resumed.files.complete_checkpoints()[-1].name == checkpoint_name(SAVED)
    succeed(run_extended, tmp_path)
    for rank in range(2):
        seen = json.loads((resumed.directory / f"count-{rank}.json").read_text())
        assert seen == {"here": UPDATES - SAVED, "all": UPDATES, "by_update": list(range(1, UPDATES + 1))}
    assert [r["update"] for r in read_metrics(resumed) if LogitNorm.metric in r] == [6, 12]


def test_a_checkpoint_without_a_part_leaves_it_as_it_is(runs, tmp_path):
    """As after an update of the program that adds one."""
    resumed = again(runs["plain"], tmp_path)
    shutil.rmtree(resumed.files.checkpoints / checkpoint_name(UPDATES))
    succeed(run_extended, tmp_path)
    seen = json.loads((resumed.directory / "count-0.json").read_text())
    assert seen["here"] == seen["all"] == UPDATES - SAVED
    assert read_result(resumed)["complete"]
