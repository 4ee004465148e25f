"""Broken inputs of every kind: each ends in one sentence that says what is wrong and where."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.cluster import load_cluster
from launch.plan.rows import load_rows
from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.config.typed import parse_override
from mvd.data.annotations import load_annotations, load_image_folder
from mvd.data.video.errors import Unreadable
from mvd.data.video.reader import open_video, read_image
from mvd.models import build_classifier, build_student, build_video_teacher
from mvd.models.checkpoints import load_official, to_official
from mvd.stage import Stage
from tests.runs import small_stage


def refused(call: Callable[[], Any], message: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said.strip() and "Traceback" not in said and len(said) < 1500, said


ANNOTATIONS: list[tuple[bytes, str]] = [
    (b"", "lists no videos"),
    (b"\n \n\t\n", "lists no videos"),
    (b"a.mp4\n", "train.csv:1: 'a.mp4' has no label"),
    (b"a.mp4 0\nb.mp4 \n", "train.csv:2: 'b.mp4' has no label"),
    (b"a.mp4 8\n", "the label must be an integer from 0 to 7, got '8'"),
    (b"a.mp4 -1\n", "got '-1'"),
    (b"a.mp4 1.0\n", "got '1.0'"),
    (b"a.mp4 nan\n", "got 'nan'"),
    (b"a.mp4 0x1\n", "got '0x1'"),
    (b"a.mp4 1e0\n", "got '1e0'"),
    ("a.mp4 \u0663\n".encode(), "got '\u0663'"),
    (b"a.mp4,3\n", "has no label"),
    (b"path,label\na.mp4,3\n", "train.csv:1: 'path,label' has no label"),
    (b"a.mp4 0\r\na.mp4 1\r\n", "already on line 1"),
    (b"a.mp4 0\n./a.mp4 0\n", "already on line 1"),
    (b"a.mp4 99999999999999999999\n", "got '99999999999999999999'"),
    (b"\x89PNG\r\n\x1a\n\xff\xfe 3\n", "is not valid UTF-8; convert the file"),
    (b"a\x00b.mp4 0\n", "train.csv:1: holds a zero byte"),
]


@pytest.mark.parametrize(("content", "message"), ANNOTATIONS, ids=lambda value: repr(value)[:30])
def test_annotations(tmp_path, content, message):
    (tmp_path / "train.csv").write_bytes(content)
    refused(lambda: load_annotations(DatasetPaths(root=str(tmp_path)), "train", 8), message)


def test_annotations_that_are_a_folder_or_absent(tmp_path):
    refused(lambda: load_annotations(DatasetPaths(root=str(tmp_path)), "train", 8), "train.csv does not exist")
    (tmp_path / "train.csv").mkdir()
    refused(lambda: load_annotations(DatasetPaths(root=str(tmp_path)), "train", 8), "train.csv does not exist")


def test_image_folders_that_hold_something_else(tmp_path):
    paths = DatasetPaths(root=str(tmp_path))
    refused(lambda: load_image_folder(paths, "train", 2), "is not a folder of class folders")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    refused(lambda: load_image_folder(paths, "train", 1), "empty")
    (tmp_path / "train" / "empty" / "notes.txt").write_text("no image")
    refused(lambda: load_image_folder(paths, "train", 1), "empty")


def half(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


VIDEOS: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda real: b"",
    "zeros": lambda real: bytes(100_000),
    "noise": lambda real: os.urandom(100_000),
    "text": lambda real: b"<html>404 Not Found</html>\n" * 50,
    "first bytes": lambda real: real.read_bytes()[:40],
    "half": half,
    "tail": lambda real: real.read_bytes()[1000:],
    "holes": lambda real: real.read_bytes()[:200] + bytes(len(real.read_bytes()) - 200),
    "archive": lambda real: b"PK\x03\x04" + real.read_bytes()[4:2000],
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(tmp_path, motion_root, name):
    path = tmp_path / "broken.mp4"
    path.write_bytes(VIDEOS[name](next((motion_root).rglob("*.mp4"))))

    def decode() -> None:
        video = open_video(str(path))
        video.frames(torch.arange(len(video)).numpy())

    refused(decode, re.escape(f"{path} cannot be read: "), Unreadable)


@pytest.mark.parametrize("name", ["none.mp4", "", "folder"])
def test_videos_that_are_no_files(tmp_path, name):
    (tmp_path / "folder").mkdir()
    refused(lambda: open_video(str(tmp_path / name)), "cannot be read: ", Unreadable)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no more", b"GIF89a", bytes(1000)])
def test_images(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    refused(lambda: read_image(str(path)), re.escape(f"{path} cannot be read: "), Unreadable)


def teacher() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return to_official(build_video_teacher("tiny"))


def write_weights(path: Path, how: str) -> Path:
    weights = teacher()
    key = "encoder.blocks.0.norm1.weight" if "encoder.blocks.0.norm1.weight" in weights else "blocks.0.norm1.weight"
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "no tensors":
        torch.save({"model": {"lr": 1.0}}, path)
    elif how == "half":
        torch.save(weights, path)
        os.truncate(path, path.stat().st_size // 2)
    elif how == "missing":
        torch.save({name: weight for name, weight in weights.items() if name != key}, path)
    elif how == "transposed":
        torch.save({name: weight.T if weight.ndim == 2 else weight for name, weight in weights.items()}, path)
    elif how == "another network":
        torch.save(to_official(build_student("small", teacher="base")), path)
    else:
        torch.save({"model": weights, "extra": Path}, path)
    return path


WEIGHTS = {
    "empty": "damaged|no checkpoint",
    "text": "no checkpoint",
    "zip": "damaged|no checkpoint",
    "list": "holds no weights",
    "no tensors": "holds no weights",
    "half": "damaged",
    "missing": "norm1.weight is missing",
    "transposed": "instead of",
    "another network": "does not fit",
    "code": "could run code",
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_weights(tmp_path, how):
    path = write_weights(tmp_path / "weights.pth", how)
    refused(lambda: load_official(build_video_teacher("tiny"), path), WEIGHTS[how])


def test_weights_of_the_safe_format_can_be_broken_too(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    refused(lambda: load_official(build_classifier("tiny", num_classes=8), path), "damaged|no checkpoint")
    save_file({"odd": torch.ones(1)}, path)
    refused(lambda: load_official(build_classifier("tiny", num_classes=8), path), "does not fit")
    refused(lambda: load_official(build_classifier("tiny", num_classes=8), tmp_path), "no checkpoint file")


SETTINGS = [
    ("name=x; touch /tmp/y", "row name 'x; touch /tmp/y' is used in folder names: .* use only letters"),
    ("name=../../elsewhere", "use only letters"),
    ("name=$(id)", "use only letters"),
    ("name=-rf", "use only letters"),
    ("finetune.sed=1", "no key 'sed'"),
    ("finetune.seed=-1", "seed must be 0 or more, got -1"),
    ("pretrain.seed=-5", "seed must be 0 or more, got -5"),
    ("finetune.seed=1e3", "seed must be an integer"),
    ("finetune.optimization.epochs=0", "epochs must be a positive number, got 0"),
    ("finetune.optimization.epochs=-3", "epochs must be a positive number, got -3"),
    ("finetune.optimization.global_batch=7", "must be a multiple of finetune.mixing.group, got 7"),
    ("finetune.optimization.base_lr=0", "base_lr must be a positive number, got 0"),
    ("finetune.optimization.base_lr=.nan", "base_lr must be a positive number, got nan"),
    ("finetune.optimization.base_lr=.inf", "base_lr must be finite, got inf"),
    ("finetune.optimization.min_lr=-1", "min_lr must be between 0 and base_lr=.*, got -1"),
    ("finetune.optimization.min_lr=99", "min_lr must be between 0 and base_lr=.*, got 99"),
    ("pretrain.mask_ratio=0.0001", "mask at least one of the 196 positions, got 0.0001"),
    ("finetune.optimization.layer_decay=1.5", "layer_decay must be above 0 and at most 1, or null, got 1.5"),
    ("finetune.optimization.warmup_epochs=999", "warmup_epochs must be between 0 and .* got 999"),
    ("pretrain.mask_ratio=1", "mask_ratio must be between 0 and 1 and .*, got 1"),
    ("pretrain.mask_ratio=0", "mask_ratio must be between 0 and 1 and .*, got 0"),
    ("pretrain.stride=0", "stride must be a positive number, got 0"),
    ("pretrain.student=giant", "unknown model size 'giant'"),
    ("pretrain.dataset=imagenet", "no video data set is called 'imagenet'"),
    ("finetune.mixing.group=3", "mixing.group must be an even number .* got 3"),
    ("finetune.mixing.smoothing=1", "smoothing must be at least 0 and below 1, got 1"),
    ("finetune.augmentation.flip=2", "flip must be a probability between 0 and 1, got 2"),
    ("test.clips=0", "clips must be a positive number, got 0"),
    ("finetune.optimization.betas=0.9", "betas must be a list of 2 numbers"),
    ("finetune=", "finetune"),
    ("=1", "the key is not complete"),
    ("finetune.seed={", "cannot be read as YAML"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_settings(setting, message):
    refused(lambda: load_rows(["vitb_from_vitb_k400"], [parse_override(setting)]), message)


CLUSTERS = [
    ("gpus: 8", "has no key 'gpus'"),
    ("nodes: -1", "nodes must be a positive number, got -1"),
    ("nodes: many", "nodes must be an integer"),
    ("workers: -1", "workers must be 0 .* got -1"),
    ("checkpoint_every: 0", "checkpoint_every must be a positive number, got 0"),
    ("checkpoint_minutes: 0", "checkpoint_minutes must be a positive number, got 0"),
    ("keep_checkpoints: 0", "keep_checkpoints must be a positive number, got 0"),
    ("keep_every_epochs: -1", "keep_every_epochs must be a positive number, got -1"),
    ("faults: {hang_minutes: 0}", "faults.hang_minutes must be a positive number, got 0"),
    ("faults: {hang_minutes: .nan}", "faults.hang_minutes must be a positive number, got nan"),
    ("faults: {spike_factor: 0.5}", "faults.spike_factor must be above 1, or null, got 0.5"),
    ("faults: {unreadable_share: 2}", "faults.unreadable_share must be between 0 and 1, got 2"),
    ("faults: {patience: 2}", "faults has no key 'patience'"),
    ("pretrain: 4", "pretrain must be a section"),
    ("datasets: {k400: /data}", "datasets"),
    ("- nodes", "holds no fields"),
    ("just text", "has no key 'just text'"),
    ("nodes: [1", "cannot be read"),
    ("\tnodes: 1", "cannot be read"),
    ("runs: ${nowhere}", "cannot be read"),
    ("nodes: 1\nnodes: 2", "cannot be read"),
]


@pytest.mark.parametrize(("content", "message"), CLUSTERS)
def test_cluster_files(tmp_path, content, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    refused(lambda: load_cluster(str(path), []), message)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "- a\n- b\n",
        lambda text: text[: len(text) // 2],
        lambda text: text[: text.index("  workers:")],
        lambda text: text.replace("kind: finetune", "kind: cooking"),
        lambda text: text.replace("  seed: 0", "  seed: zero"),
        lambda text: text.replace("  seed: 0", "  seeds: 0"),
        lambda text: text.replace("recipe:", "recipes:"),
        lambda text: text.replace("world_size: 2", "world_size: two"),
        lambda text: "\x00\x01",
    ],
    ids=["empty", "list", "half", "between settings", "kind", "type", "key", "section", "number", "bytes"],
)
def test_stage_files(tmp_path, spoil):
    path = tmp_path / "stage.yaml"
    path.write_text(spoil(small_stage("finetune", "x", tmp_path, tmp_path).to_yaml()))
    refused(lambda: Stage.from_yaml(path), re.escape(f"{path} is not a stage that this version can run"))
