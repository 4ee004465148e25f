"""Weights files are inspected without torch, and nothing in them is run."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mvd.config import ConfigError
from mvd.models import build_image_teacher, build_student
from mvd.models.checkpoints import to_official
from mvd.weight_shapes import Geometry, check_encoder, geometry, read_shapes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return to_official(build_student("tiny", teacher="tiny"))


def as_training_code_saves_it(state: dict[str, torch.Tensor], path: Path) -> None:
    group = {"lr": np.float64(1.5e-4), "params": [0]}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [group]}
    torch.save({"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=1e-3)}, path)


@pytest.mark.parametrize("name", ["plain.safetensors", "nested.pth", "parameters.pth"])
def test_names_and_shapes_are_those_that_torch_reads(name, state, tmp_path):
    path = tmp_path / name
    if name == "plain.safetensors":
        save_file(state, path)
    elif name == "nested.pth":
        as_training_code_saves_it(state, path)
    else:
        torch.save({key: torch.nn.Parameter(value) for key, value in state.items()}, path)
    assert read_shapes(path) == {key: tuple(value.shape) for key, value in state.items()}
    assert geometry(read_shapes(path)) == Geometry(width=96, depth=4)


def test_a_teacher_of_another_size_is_refused(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": to_official(build_image_teacher("tiny"))}, path)
    assert check_encoder(path, "tiny").endswith("width 96, depth 4")
    with pytest.raises(ConfigError, match="width 96 and depth 4, but size 'base' has width 768 and depth 12"):
        check_encoder(path, "base")


def test_no_code_of_a_file_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/run",)

    torch.save({"model": {"a": torch.zeros(2)}, "args": Hostile()}, tmp_path / "hostile.pth")
    assert read_shapes(tmp_path / "hostile.pth") == {"a": (2,)}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all, but long enough", bytes(64)])
def test_another_file_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="file.pth"):
        check_encoder(path, "tiny")
    with pytest.raises(ConfigError, match="no file"):
        read_shapes(tmp_path / "missing.pth")


def test_torch_is_not_imported():
    code = "import sys, mvd.weight_shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
