"""Accuracy over several processes equals that of a plain implementation of the definition."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mvd import config
from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.config.sizes import SIZES
from mvd.data.datasets import load_entries
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import Process, start_processes
from mvd.distributed.signals import Interrupted
from mvd.evaluation import multiview, validation
from mvd.evaluation.predictions import read_predictions
from mvd.evaluation.statistics import wilson_interval
from mvd.evaluation.views_of_file import test_views
from mvd.files import sha256, write_json
from mvd.models import build_classifier, build_student
from mvd.models.checkpoints import load_official, to_official
from mvd.run import run_stage
from mvd.stage import Execution, Stage
from tests.runs import again, read_result, small_stage, succeed, timeless, write_stage

CLIP = SIZES["tiny"].clip
COUNTS = (1, 2)


class Judged(NamedTuple):
    """The stages as one and as two processes ran them, with their output, and the expected accuracies in percent."""

    test: dict[int, Stage]
    val_top1: dict[int, dict[str, float]]
    printed: dict[int, list[str]]
    expected: dict[str, float]
    broken: str


def run_both(folder: Path) -> None:
    process = start_processes()
    stage = Stage.from_yaml(folder / "finetune" / "stage.yaml")
    model = build_classifier("tiny", num_classes=8)
    load_official(model, folder / "classifier.safetensors")
    signs, say = [], validation.heartbeat
    validation.heartbeat = lambda *turn: signs.append(turn) or say(*turn)
    values = validation.Validation(stage, process).run(model)
    numbers = {name: value for name, value in values.items() if name.startswith("val_")}  # without the picture
    write_json(folder / f"validated-{process.rank}.json", numbers)
    write_json(folder / f"signs-{process.rank}.json", len(signs))
    run_stage(Stage.from_yaml(folder / "test" / "stage.yaml"))
    if process.world_size == 2:
        run_stage(Stage.from_yaml(folder / "regrouped" / "stage.yaml"))
    try:
        run_stage(Stage.from_yaml(folder / "headless" / "stage.yaml"))
    except ConfigError as error:
        write_json(folder / "refused.json", str(error))
    except SystemExit as leaving:  # the first process prints the error
        write_json(folder / f"left-{process.rank}.json", leaving.code)
    try:
        run_stage(Stage.from_yaml(folder / "gone" / "stage.yaml"))
    except RunFailed as error:
        write_json(folder / f"given-up-{process.rank}.json", str(error))
    run_with_nan(folder, process)


def run_with_nan(folder: Path, process: Process) -> None:
    """A test whose first process computes NaN for its second video, and then again without that."""
    stage = Stage.from_yaml(folder / "nan" / "stage.yaml")
    forwards, forward = [], multiview._forward

    def spoilt(*arguments) -> np.ndarray:
        forwards.append(1)
        return forward(*arguments) * (math.nan if len(forwards) == 2 and process.is_first else 1)

    multiview._forward = spoilt
    try:
        run_stage(stage)
    except RunFailed as error:
        write_json(folder / f"nan-{process.rank}.json", str(error))
    forwards.clear()
    forwards += [1, 1]
    run_stage(stage)
    multiview._forward = forward
    write_json(folder / f"again-{process.rank}.json", len(forwards) - 2)


def run_in_shards(folder: Path) -> None:
    """The test in three shards, of which the second is stopped after two videos and then started again."""
    how = {"shards": 3, "runs": str(folder / "split")}
    stage = Stage.from_yaml(folder / "test" / "stage.yaml")
    stage = dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, world_size=1, **how))
    first, second, third = stage.in_shards()
    forwards, forward = [], multiview._forward
    multiview._forward = lambda *arguments: forwards.append(1) or forward(*arguments)
    run_stage(first)
    forwards.clear()
    multiview.stop_requested = lambda: len(forwards) >= 2
    try:
        run_stage(second)
    except Interrupted:
        stopped_after = len(forwards)
    multiview.stop_requested = lambda: False
    run_stage(third)
    done_early = (stage.directory / "result.json").exists()
    forwards.clear()
    run_stage(second)
    write_json(folder / "split.json", {"stopped": stopped_after, "then": len(forwards), "early": done_early})


def lively_classifier() -> nn.Module:
    """Random weights with predictions that differ between videos; those of a new head hardly do."""
    torch.manual_seed(2)
    model = build_classifier("tiny", num_classes=8).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=1.0)
    return model


@torch.no_grad()
def answers(model: nn.Module, path: str, clips: int, crops: int) -> list[int]:
    """The classes of a video, by descending probability."""
    views = test_views(path, "dense", clips, crops, stride=1, clip=CLIP)
    return model(views).softmax(dim=1).mean(dim=0).argsort(descending=True).tolist()


def label_lists(folder: Path, root: Path, model: nn.Module) -> dict[str, float]:
    """Writes val.csv and test.csv with one broken video each, and labels so that the accuracies are known.

    In turn the likeliest class, the second and the last are written down as the true one. The last video has the
    file name of the first one.
    """
    videos = [str(root / line.rpartition(" ")[0]) for line in (root / "val.csv").read_text().splitlines()]
    namesake = folder / Path(videos[0]).name
    namesake.write_bytes(Path(videos.pop()).read_bytes())
    videos.append(str(namesake))
    wanted = [(0, 1, 7)[number % 3] for number in range(len(videos))]
    broken = folder / "broken.mp4"
    broken.write_bytes(Path(videos[0]).read_bytes()[:500])
    for name, clips, crops in (("val", 1, 1), ("test", 2, 3)):
        labels = [answers(model, video, clips, crops)[place] for video, place in zip(videos, wanted, strict=True)]
        assert len(set(labels)) > 2
        lines = [f"{video} {label}\n" for video, label in zip(videos, labels, strict=True)]
        (folder / f"{name}.csv").write_text("".join([*lines[:5], f"{broken} 0\n", *lines[5:]]))
    total = len(videos) + 1
    return {"top1": 100 * wanted.count(0) / total, "top5": 100 * sum(place < 5 for place in wanted) / total}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, motion_root) -> Judged:
    folder = tmp_path_factory.mktemp("accuracy")
    model = lively_classifier()
    expected = label_lists(folder, motion_root, model)
    data = DatasetPaths(root=str(motion_root), val=str(folder / "val.csv"), test=str(folder / "test.csv"))
    some = [line for line in (folder / "test.csv").read_text().splitlines() if str(folder / "broken.mp4") not in line]
    (folder / "gone.csv").write_text("".join(f"{line}\ngone-{n}.mp4 0\n" for n, line in enumerate(some[:11])))
    tests, validated, printed = {}, {}, {}
    for count in COUNTS:
        runs = folder / f"{count} processes"
        runs.mkdir()
        weights = runs / "classifier.safetensors"
        save_file(to_official(model), weights)
        write_stage(small_stage("finetune", "finetune", runs, data, workers=count - 1))
        tests[count] = test_stage("test", runs, data, weights, workers=count - 1)
        test_stage("nan", runs, data, weights, workers=0)
        save_file(to_official(build_student("tiny", teacher="tiny")), runs / "student.safetensors")
        gone = dataclasses.replace(data, root=str(runs), test=str(folder / "gone.csv"))
        test_stage("gone", runs, gone, weights, workers=0)
        test_stage("headless", runs, data, runs / "student.safetensors", workers=0)
        if count == 2:
            regrouped = test_stage("regrouped", runs, data, weights, workers=0)
            shutil.copytree(tests[1].directory / "logits", regrouped.directory / "logits")
        printed[count] = succeed(run_both, runs, count)
        if count == 1:
            succeed(run_in_shards, runs, 1)
        reports = [json.loads(path.read_text()) for path in runs.glob("validated-*.json")]
        assert len(reports) == count and all(report == reports[0] for report in reports)
        validated[count] = reports[0]
    return Judged(tests, validated, printed, expected, str(folder / "broken.mp4"))


def test_stage(name: str, runs: Path, data: DatasetPaths, weights: Path, workers: int) -> Stage:
    recipe = config.Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=2, crops=3)
    how = Execution(world_size=2, micro_batch=4, precision="fp32", runs=str(runs), data=data, workers=workers)
    stage = Stage(kind="test", id=name, recipe=recipe, inputs={"finetune": str(weights)}, execution=how)
    write_stage(stage)
    return stage


test_stage.__test__ = False


@pytest.mark.parametrize("count", COUNTS)
def test_the_test_counts_every_video_once_and_unreadable_ones_as_wrong(judged, count):
    result = read_result(judged.test[count])
    assert {name: result[name] for name in ("top1", "top5")} == pytest.approx(judged.expected, abs=1e-9)
    assert result["unreadable"] == [judged.broken]
    assert (result["videos"], result["views"]) == (17, 6)
    assert f"unreadable, counted as wrong: {judged.broken}" in judged.printed[count][0]


def test_a_split_test_gives_the_same_and_goes_on_where_it_stopped(judged):
    whole = read_result(judged.test[1])
    runs = judged.test[1].directory.parent
    split = json.loads((runs / "split" / "test" / "result.json").read_text())
    assert timeless(split) == timeless(whole)
    told = json.loads((runs / "split.json").read_text())
    assert told == {"stopped": 2, "then": 4, "early": False}  # of the six videos of its share


def test_two_processes_go_on_with_what_one_has_tested(judged):
    regrouped = read_result(dataclasses.replace(judged.test[2], id="regrouped"))
    one = read_result(judged.test[1])
    assert all(regrouped[name] == one[name] for name in ("top1", "top1_interval", "top5", "unreadable"))


@pytest.mark.parametrize("count", COUNTS)
def test_the_result_says_where_it_comes_from(judged, count):
    stage = judged.test[count]
    result, facts = read_result(stage), read_result(stage)["provenance"]
    low, high = result["top1_interval"]
    assert low < result["top1"] < high
    correct = round(result["top1"] * 17 / 100)
    assert [low, high] == pytest.approx([100 * bound for bound in wilson_interval(correct, 17)])
    assert facts["processes"] == count and facts["gpu"] is None and facts["gpu_hours"] == 0
    assert facts["weights_sha256"] == sha256(Path(stage.inputs["finetune"]))
    assert facts["lists"]["test"]["sha256"] == sha256(Path(stage.execution.data.test))


def test_a_tests_predictions_are_read_back_from_its_logits(judged):
    whole = judged.test[1]
    model, entries = lively_classifier(), load_entries(whole, "test")
    read = [entry for entry in entries if entry.path != judged.broken]
    split = dataclasses.replace(
        whole, execution=dataclasses.replace(whole.execution, runs=f"{whole.execution.runs}/split")
    )
    tested_again = dataclasses.replace(whole, id="nan")  # whose second video comes last in its file
    for stage in (whole, judged.test[2], split, tested_again):
        found = read_predictions(stage)
        assert found.videos == [entry.path for entry in read] and found.note == ""
        assert found.labels.tolist() == [entry.label for entry in read]
        assert found.predicted[:1].tolist() == [answers(model, entry.path, 2, 3)[0] for entry in read[:1]]
        assert found.matrix.sum() == 16 and found.matrix.trace() == round(judged.expected["top1"] * 17 / 100)
        assert found.names[0] == "left"
        mistakes = found.surest_mistakes(3)
        assert all(found.predicted[n] != found.labels[n] for n in mistakes)
        assert found.confidence[mistakes].tolist() == sorted(found.confidence[mistakes], reverse=True)


def test_predictions_without_their_list_have_no_names_and_damaged_ones_are_named(judged, tmp_path):
    stage = again(judged.test[1], tmp_path)
    (tmp_path / "test.csv").write_text(f"{judged.broken} 0\n")
    other = dataclasses.replace(
        stage.execution, data=dataclasses.replace(stage.execution.data, test=f"{tmp_path}/test.csv")
    )
    found = read_predictions(dataclasses.replace(stage, execution=other))
    assert found.videos[0] == "video 1" and "the list of test videos has changed" in found.note
    (stage.directory / "logits" / "rank-0000.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="rank-0000.npz is damaged"):
        read_predictions(stage)
    (stage.directory / "logits" / "rank-0000.npz").unlink()
    with pytest.raises(ConfigError, match="has no logits"):
        read_predictions(stage)


@pytest.mark.parametrize("count", COUNTS)
def test_validation_counts_every_video_once_and_unreadable_ones_as_wrong(judged, count):
    expected = {"val_top1": judged.expected["top1"], "val_unreadable": 1}
    found = {name: value for name, value in judged.val_top1[count].items() if name != "val_loss"}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_the_validation_loss_is_the_mean_over_readable_videos(judged, count):
    model, losses = lively_classifier(), []
    for path, label in load_entries(judged.test[count], "val"):
        if path != judged.broken:
            logits = model(test_views(path, "dense", 1, 1, stride=1, clip=CLIP))
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
    assert judged.val_top1[count]["val_loss"] == pytest.approx(sum(losses) / 16, rel=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_validation_shows_the_watchdog_that_it_gets_on(judged, count):
    signs = [json.loads(path.read_text()) for path in judged.test[count].directory.parent.glob("signs-*.json")]
    assert signs == [math.ceil(17 / count / 4)] * count  # one for each four videos of a process


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_logits_are_kept_in_full_precision(judged, count):
    model = lively_classifier()
    stage = judged.test[count]
    entries = load_entries(stage, "test")
    for path in (stage.directory / "logits").iterdir():
        part = np.load(path)
        assert part["logits"].dtype == np.float32
        number, logits = int(part["indices"][0]), part["logits"][0]
        views = test_views(entries[number].path, "dense", 2, 3, stride=1, clip=CLIP)
        np.testing.assert_allclose(logits, model(views), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_a_test_half_of_whose_videos_are_gone_gives_no_result(judged, count):
    runs = Path(judged.test[count].execution.runs)
    said = [json.loads((runs / f"given-up-{rank}.json").read_text()) for rank in range(count)]
    assert len(set(said)) == 1 and "gone: 11 of 22 test videos cannot be read" in said[0]
    assert not (runs / "gone" / "result.json").exists() and (runs / "gone" / "logits" / "rank-0000.npz").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_a_video_whose_logits_are_not_finite_is_named_and_tested_again(judged, count):
    runs = Path(judged.test[count].execution.runs)
    said, again = (
        [json.loads((runs / f"{name}-{n}.json").read_text()) for n in range(count)] for name in ("nan", "again")
    )
    assert len(set(said)) == 1 and "nan: the logits of 1 of 17 test videos are not finite" in said[0]
    assert ".mp4; check weights and precision" in said[0] and again == [1, 0][:count]
    results = [read_result(Stage.from_yaml(runs / name / "stage.yaml")) for name in ("nan", "test")]
    first, second = ({name: result[name] for name in ("top1", "top5", "unreadable")} for result in results)
    assert first == second


@pytest.mark.parametrize("count", COUNTS)
def test_weights_without_a_head_are_not_tested(judged, count):
    refused = json.loads((Path(judged.test[count].execution.runs) / "refused.json").read_text())
    assert "student.safetensors lacks fc_norm.weight" in refused and "test the weights of a fine-tuning" in refused
    left = [json.loads(path.read_text()) for path in Path(judged.test[count].execution.runs).glob("left-*.json")]
    assert left == [2] * (count - 1)


def test_the_rate_leaves_out_the_videos_that_the_loader_has_read_before(monkeypatch):
    progress = multiview._TestProgress(Process(1, 2, torch.device("cpu")), turns=5)
    clock = iter([10.0, 10.1, 10.2, 12.2, 14.2])
    monkeypatch.setattr(multiview.time, "monotonic", lambda: next(clock))
    assert progress.steady_rate(read_before=2) is None
    for turn in range(1, 6):
        progress.show(turn, 0)
    assert progress.steady_rate(read_before=2) == pytest.approx(2 * 2 / 4.0)
    assert progress.steady_rate(read_before=9) == pytest.approx(2 * 1 / 2.0)
