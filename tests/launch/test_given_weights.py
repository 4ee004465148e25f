"""Weights from elsewhere, through the commands that a user types: a student to fine-tune, then a classifier to test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvd.models import build_student
from mvd.models.checkpoints import to_official

ROW = """
import dataclasses
from experiments import demo
row = dataclasses.replace(demo.rows[0], name="mine")
"""


@pytest.fixture
def row(tmp_path) -> Path:
    """A row file of the tiny size, outside the project."""
    path = tmp_path / "mine.py"
    path.write_text(ROW)
    return path


def test_given_weights_are_finetuned_then_exported_and_tested(launch, row, motion_root, tmp_path):
    torch.manual_seed(3)
    torch.save({"model": to_official(build_student("tiny", teacher="tiny"))}, tmp_path / "student.pth")
    settings = ["finetune.optimization.epochs=1", "test.clips=1", "cluster.local_processes=1"]
    settings += [f"cluster.datasets.motion.root={motion_root}", "--local"]

    tuned = launch("submit.py", str(row), "pretrain.weights=student.pth", *settings)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    used = f"{tmp_path}/student.pth: 54 keys used; 45 ignored: pos_embed, mask_token_img"
    assert tuned.stdout.count(used) == 1 and "freshly initialised: fc_norm.weight" in tuned.stdout
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "runs").glob("*-*"))
    assert kinds == ["finetune", "test"]

    (directory,) = (tmp_path / "runs").glob("finetune-*")
    command = [sys.executable, "-m", "mvd.export", str(directory), "--to", "official", "--output", "tuned.pth"]
    exported = subprocess.run(command, cwd=tmp_path, env=os.environ.copy(), capture_output=True, text=True)
    assert exported.returncode == 0, exported.stderr

    tested = launch("submit.py", str(row), "finetune.weights=tuned.pth", *settings)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert f"{tmp_path}/tuned.pth: 58 keys used; 0 ignored" in tested.stdout
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("test-*/result.json"))
    assert {key: first[key] for key in ("top1", "top5", "videos")} == {
        key: second[key] for key in ("top1", "top5", "videos")
    }
    assert len(list((tmp_path / "runs").glob("finetune-*"))) == 1
