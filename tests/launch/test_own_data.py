"""Your own videos, as a user handles them: prepare them, declare them in a row file, fine-tune, test and predict."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.special import softmax

from launch.plan.graph import build_graph
from mvd.config import SIZES, ConfigError, Dataset, Row
from mvd.export import export
from mvd.stage import Stage
from mvd.weight_check import network_shapes
from tests.data.stages import recipe
from tests.waiting import LIMIT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_videos.md"


def test_own_videos_from_their_folders_to_predictions(class_folders, launch, profile, tmp_path):
    prepare = [sys.executable, "-m", "mvd.data.prepare", str(class_folders), str(tmp_path / "mine"), "--workers", "1"]
    prepare += ["--test-share", "0.25", "--size", "tiny"]
    prepared = subprocess.run(prepare, capture_output=True, text=True, timeout=LIMIT)
    assert prepared.returncode == 0, prepared.stderr
    (named,) = re.findall(r"^ +(datasets: .*)$", prepared.stdout, flags=re.MULTILINE)
    with profile.open("a") as handle:
        handle.write(f"{named}\n")

    words = ["mine/mine_tiny.py", "--local", "cluster.local_processes=1"]
    words += [f"finetune.optimization.{name}" for name in ("epochs=1", "warmup_epochs=0.5")]
    tuned = launch("submit.py", *words, "--until", "finetune")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    (run,) = (tmp_path / "runs").glob("finetune-mine_tiny-*")
    stage = Stage.from_yaml(run / "stage.yaml")
    videos = {name: len((tmp_path / f"mine/{name}.csv").read_text().splitlines()) for name in ("train", "val", "test")}
    assert videos == {"train": 15, "val": 3, "test": 6}
    assert stage.recipe.own_dataset == Dataset(classes=3, train_samples=15, val_samples=3)

    tested = launch("submit.py", *words)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "complete already, skipped" in tested.stdout
    (result,) = (tmp_path / "runs").glob("test-mine_tiny-*/result.json")
    top1 = json.loads(result.read_text())["top1"]
    assert min(abs(top1 - 100 * right / videos["test"]) for right in range(videos["test"] + 1)) < 1e-3
    assert f"{top1:.1f}" in launch("report.py", *words[:1], *words[3:]).stdout

    check_names(run, tmp_path / "timm")
    check_predictions(result.parent, tmp_path)

    with (tmp_path / "mine" / "train.csv").open("a") as handle:
        handle.write(f"{class_folders}/left/more.mp4 0\n")
    refused = launch("submit.py", *words, "finetune.seed=1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "train.csv lists 16 samples, but the row declares train_samples=15 for mine; set it to 16" in refused.stderr


def check_names(run: Path, folder: Path) -> None:
    """The folders' names are in a fine-tuning's run directory, in its weights, and in the folder exported for timm."""
    names = ["left", "right", "up"]
    assert json.loads((run / "classes.json").read_text()) == names
    with safe_open(run / "weights.safetensors", "pt") as file:
        assert file.get_slice("head.weight").get_shape()[0] == 3
        protocol = json.loads(file.metadata()["protocol"])
    described = {"size": "tiny", "sampling": "dense", "stride": 1, "frames": 16, "image_size": 48, "names": names}
    assert described.items() <= protocol.items()
    config = json.loads((export(run, "timm", folder) / "config.json").read_text())
    assert config["label_names"] == names and described.items() <= config["protocol"].items()


def check_predictions(test: Path, folder: Path) -> None:
    """mvd.predict's probabilities are those of the logits that the test stage has written."""
    listed = [line.rpartition(" ")[0] for line in (folder / "mine" / "test.csv").read_text().splitlines()]
    command = [sys.executable, "-m", "mvd.predict", str(test), *listed, "--csv", str(folder / "predictions.csv")]
    predicted = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert predicted.returncode == 0 and listed[0].rpartition("/")[2] in predicted.stdout, predicted.stderr
    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    assert [row["video"] for row in rows] == listed
    logits = np.load(test / "logits" / "rank-0000.npz")
    order = np.argsort(logits["indices"])
    expected = softmax(logits["logits"][order].astype(np.float64), axis=2).mean(axis=1)
    found = [[float(row[name]) for name in ("left", "right", "up")] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [row["class"] for row in rows] == [("left", "right", "up")[number] for number in expected.argmax(axis=1)]


@pytest.fixture
def lists(tmp_path) -> Path:
    """What prepare leaves of a data set of three classes, without the videos; the profile names it."""
    for split, videos in (("train", 800), ("val", 90), ("test", 90)):
        (tmp_path / f"{split}.csv").write_text("".join(f"{split}/{n}.mp4 {n % 3}\n" for n in range(videos)))
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": {"a": 0, "b": 1, "c": 2}}))
    return tmp_path


def readme_row(**facts: int) -> str:
    """The row file of docs/own_videos.md, about another data set."""
    (example,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "row =" in text]
    return re.sub(r"Dataset\(.*\)", repr(Dataset(**facts)), example)


FACTS = {"classes": 3, "train_samples": 800, "val_samples": 90}


def test_the_readmes_row_file(lists, launch, profile, tmp_path):
    profile.write_text(f"{profile.read_text()}datasets: {{mine: {{root: {lists}}}, k400: {{root: {lists}}}}}\n")
    (tmp_path / "mine.py").write_text(readme_row(**FACTS))
    plan = launch("submit.py", "mine.py", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert re.search(r"finetune-mine-[0-9a-f]{8}", plan.stdout) and "pretrain-vitb_from_vitb_e400-" in plan.stdout


@pytest.mark.parametrize(
    ("change", "root", "message"),
    [
        (
            {"classes": 4},
            "mine",
            r"manifest.json has 3 classes, but the row declares classes=4 for mine; set it to 3",
        ),
        ({"classes": 2}, "mine", r"manifest.json has 3 classes, but the row declares classes=2"),
        ({"val_samples": 80}, "mine", r"val.csv lists 90 samples, but the row declares val_samples=80"),
        ({"train_samples": 300}, "mine", r"mine has 300 training samples, .*; set finetune.optimization.global_batch"),
        ({}, "mein", r"datasets.mine.root: folder of the mine videos; the profile has mein"),
    ],
)
def test_a_declaration_that_the_data_does_not_bear_out(change, root, message, lists, launch, profile, tmp_path):
    if "train_samples" in change:
        lines = (lists / "train.csv").read_text().splitlines()[: change["train_samples"]]
        (lists / "train.csv").write_text("\n".join(lines))
    assert re.search(message, refusal(change, root, lists, launch, profile, tmp_path))


def test_a_manifest_of_something_else(lists, launch, profile, tmp_path):
    (lists / "manifest.json").write_text("[]")
    said = refusal({}, "mine", lists, launch, profile, tmp_path)
    assert "manifest.json was not written by mvd.data.prepare; prepare the data again" in said


def refusal(change, root, lists, launch, profile, tmp_path) -> str:
    """What submit.py says of the README's row with these changes to its facts, its data being called `root`."""
    profile.write_text(f"{profile.read_text()}datasets: {{{root}: {{root: {lists}}}, k400: {{root: {lists}}}}}\n")
    (tmp_path / "mine.py").write_text(readme_row(**FACTS | change))
    shapes = network_shapes("pretrain", SIZES["base"], 3)
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "student.pth")
    refused = launch("submit.py", "mine.py", "pretrain.weights=student.pth")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    return refused.stderr


def test_the_facts_decide_the_run_directory():
    def identity(**change: int) -> str:
        made = recipe("finetune", dataset="mine", own_dataset=Dataset(**FACTS | change))
        return build_graph([Row(name="mine", finetune=made)])[0].id

    assert len({identity(), identity(classes=4), identity(train_samples=801), identity(val_samples=91)}) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "mine"}, "no video data set is called 'mine'; use one of k400, ssv2, .*, or declare your own"),
        ({"dataset": "k400", "own_dataset": Dataset(**FACTS)}, "k400 is a known data set; remove own_dataset"),
        ({"dataset": "my set", "own_dataset": Dataset(**FACTS)}, "use only letters, digits"),
        (
            {"dataset": "mine", "own_dataset": Dataset(**FACTS, media="image")},
            "own_dataset must .*got media='image' for mine",
        ),
    ],
)
def test_names_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        recipe("finetune", **fields)
