"""Weights files are inspected without torch, and nothing in them is run."""

import argparse
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mvd.config import ConfigError
from mvd.models import build_student
from mvd.models.checkpoints import to_official
from mvd.weight_shapes import read_header

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return to_official(build_student("tiny", teacher="tiny"))


def as_training_code_saves_it(state, path, **how):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": np.float64(1.5e-4), "params": [0]}]}
    content = {"model": OrderedDict(state), "optimizer": optimizer, "args": argparse.Namespace(lr=1e-3), "tags": {1, 2}}
    torch.save(content, path, **how)


WRITERS = {
    "plain.safetensors": save_file,
    "plain.pth": torch.save,
    "training.pth": as_training_code_saves_it,
    "older.pth": lambda state, path: as_training_code_saves_it(state, path, _use_new_zipfile_serialization=False),
    "parameters.pth": lambda state, path: torch.save({k: torch.nn.Parameter(v) for k, v in state.items()}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_names_shapes_and_places_are_those_that_torch_reads(name, state, tmp_path):
    path = tmp_path / name
    WRITERS[name](state, path)
    header = read_header(path)
    assert {key: form.shape for key, form in header.forms.items()} == {k: tuple(v.shape) for k, v in state.items()}
    assert {(form.dtype, form.kind) for form in header.forms.values()} == {("float32", "dense")}
    data = path.read_bytes()
    for key, tensor in header.tensors.items():
        span = header.spans[tensor.storage]
        start = span.start + 4 * tensor.offset
        values = np.frombuffer(data[start : start + 4 * state[key].numel()], np.float32)
        assert np.array_equal(values, state[key].numpy().ravel())


def test_tensors_without_plain_values_are_told_apart(tmp_path):
    tensors = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "half": torch.ones(3).half(),
        "bfloat": torch.ones(3).bfloat16(),
        "whole": torch.arange(3),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    tensors["with an attribute"] = torch.ones(4)
    tensors["with an attribute"].tag = 1
    torch.save(tensors, tmp_path / "odd.pth")
    forms = read_header(tmp_path / "odd.pth").forms
    assert (forms["sparse"].kind, forms["meta"].kind) == ("sparse", "meta")
    dtypes = {key: form.dtype for key, form in forms.items() if form.kind == "dense"}
    assert dtypes == {
        "half": "float16",
        "bfloat": "bfloat16",
        "whole": "int64",
        "float8": "float8",
        "with an attribute": "float32",
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_no_code_of_a_file_is_run(tmp_path, zipped):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/run",)

    path = tmp_path / "hostile.pth"
    content = {"model": {"a": torch.zeros(2)}, "args": Hostile()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match=r"hostile\.pth.* contains a (posix|nt)\.mkdir, which could run code"):
        read_header(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all, but long enough", bytes(64), b"\xff" * 8 + b"{}"])
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_another_file_is_refused_in_a_sentence(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name) as caught:
        read_header(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_refused(tmp_path, name, state):
    path = tmp_path / name
    WRITERS[name](state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match="damaged|truncated"):
        read_header(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        read_header(tmp_path / "missing.pth")


def test_torch_is_not_imported():
    code = "import sys, mvd.weight_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
