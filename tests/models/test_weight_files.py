"""Loading a downloaded file runs no code, and an unreadable file gives one sentence."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import nn

from mvd.models import build_classifier
from mvd.models.checkpoints import CheckpointError, load_official, to_official
from mvd.models.weight_files import read_weights
from mvd.weight_shapes import read_header


def classifier():
    return build_classifier("tiny", num_classes=8)


class Hostile:
    """A pickle that would run a command when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class HostileNamespace(argparse.Namespace):
    """Looks like the arguments of an official file, but has a __setstate__ of its own."""

    def __setstate__(self, state):
        os.mkdir(state["path"])


def save_tar(content, path):
    """A file as PyTorch before 0.1.10 wrote it."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def save_scripted(content, path):
    torch.jit.script(nn.Linear(2, 2)).save(path)


WRITERS = {
    "zip": torch.save,
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "tar": save_tar,
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "scripted": save_scripted,
}
HIDING_PLACES = {
    "beside the weights": lambda hostile, weights: {"model": weights, "extra": hostile},
    "in place of the weights": lambda hostile, weights: hostile,
    "among the weights": lambda hostile, weights: {"model": {**weights, "head.bias": hostile}},
    "in the arguments": lambda hostile, weights: {
        "model": weights,
        "args": argparse.Namespace(data=[{"a": (hostile,)}]),
    },
    "as a key": lambda hostile, weights: {"model": weights, hostile: 1},
}


def assert_refused_unrun(path, trace):
    model = classifier()
    before = to_official(model)
    with pytest.raises(CheckpointError, match="could run code") as caught:
        load_official(model, path)
    assert not trace.exists()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in to_official(model).items())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.filterwarnings("ignore:.*(pickle protocol|TorchScript|torch.jit)")
def test_no_format_of_a_hostile_pickle_is_run(tmp_path, write):
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    write({"model": classifier().state_dict(), "extra": Hostile(trace)}, path)
    assert_refused_unrun(path, trace)


@pytest.mark.parametrize("hide", HIDING_PLACES.values(), ids=HIDING_PLACES)
def test_no_place_of_a_hostile_object_is_run(tmp_path, hide):
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    torch.save(hide(Hostile(trace), to_official(classifier())), path)
    assert_refused_unrun(path, trace)


def test_a_namespace_of_another_kind_is_refused(tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    weights = to_official(classifier())
    torch.save({"model": weights, "args": HostileNamespace(path=str(trace))}, path)
    assert_refused_unrun(path, trace)


def test_a_hostile_pickle_is_no_safetensors_file(tmp_path):
    path, trace = tmp_path / "hostile.safetensors", tmp_path / "trace"
    torch.save(Hostile(trace), path)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_official(classifier(), path)
    assert not trace.exists()


def test_entries_that_are_no_weights_are_passed_over(tmp_path):
    weights = to_official(classifier())
    torch.save(
        {"model": {**weights, 7: torch.ones(2), "step": 3}, "args": argparse.Namespace(a={1})}, tmp_path / "a.pth"
    )
    assert load_official(classifier(), tmp_path / "a.pth").used == tuple(weights)


def test_a_container_that_pretends_to_be_another_ends_in_a_sentence(tmp_path):
    """Pickles may set attributes of an OrderedDict, which hide its methods."""
    weights = OrderedDict(to_official(classifier()))
    weights.get = "no method"
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_official(classifier(), tmp_path / "odd.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_damaged_file_is_refused(tmp_path, name):
    path = tmp_path / name
    weights = to_official(classifier())
    torch.save(weights, path) if name.endswith("pth") else safetensors.torch.save_file(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged|no checkpoint"):
        load_official(classifier(), path)


def test_absent_file_and_empty_state_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_official(classifier(), tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_official(classifier(), {"epoch": 3})


def training_state(weights):
    """What the official training programs pickle beside the weights, and what else is common there."""
    group = {"lr": np.float64(1.5e-4), "weight_decay": np.float32(0.05), "betas": (0.9, 0.95), "params": [0]}
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [group]},
        "epoch": np.int64(2),
        "best": np.bool_(True),
        "numpy_state": np.arange(4, dtype=np.uint32),
        "shape": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "started": datetime(2024, 5, 1, tzinfo=UTC),
        "settings": OmegaConf.create({"model": {"depth": 12}, "scales": [1, 2.0]}),
        "args": argparse.Namespace(lr=1e-3, output_dir=Path("runs/1")),
    }


def rename_modules(path, names):
    """Rewrites the pickle of a checkpoint as if the classes in it had come from other modules."""
    with zipfile.ZipFile(path) as archive:
        members = {item: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for item, content in members.items():
            renamed = content
            for old, new in names.items() if item.filename.endswith("data.pkl") else ():
                renamed = renamed.replace(f"c{old}\n".encode(), f"c{new}\n".encode())
            archive.writestr(item, renamed)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"numpy._core.multiarray": "numpy.core.multiarray"},
        {"pathlib": "pathlib._local"},
        {"pathlib\nPosixPath": "pathlib\nWindowsPath"},
    ],
    ids=["as written here", "NumPy 1", "Python 3.13", "Windows"],
)
def test_what_training_code_saves_beside_the_weights_is_accepted(tmp_path, names):
    weights = to_official(classifier())
    torch.save(training_state(weights), tmp_path / "training.pth")
    rename_modules(tmp_path / "training.pth", names)
    assert load_official(classifier(), tmp_path / "training.pth").used == tuple(weights)


def reduced(function, *arguments, state=None):
    """An object whose pickle calls a function and sets a state."""

    class Reduced:
        def __reduce__(self):
            return (function, arguments, state) if state is not None else (function, arguments)

    return Reduced()


def hostile_numpy():
    """Pickles that would have NumPy rebuild objects of foreign memory or contents."""
    scalar, reconstruct = np._core.multiarray.scalar, np._core.multiarray._reconstruct
    return {
        "an object from bytes": reduced(scalar, np.dtype("O"), b"\x00" * 8),
        "a number with an object's flags": reduced(
            scalar, reduced(np.dtype, "f8", False, True, state=(3, "<", None, None, None, 8, 8, 63)), b"\x00" * 8
        ),
        "an array of another item size": reduced(
            reconstruct, np.ndarray, (0,), b"b", state=(1, (1000,), np.dtype(">f8"), False, b"\x00" * 8)
        ),
        "a huge array": reduced(np.ndarray, (1 << 40,), np.dtype("f8")),
        "a memory map": reduced(np.ndarray, (2,), np.dtype("f8"), b"\x00" * 16),
    }


@pytest.mark.parametrize("name", hostile_numpy())
def test_numpy_never_rebuilds_what_a_file_says(tmp_path, name):
    weights = to_official(classifier())
    torch.save({"model": weights, "extra": hostile_numpy()[name]}, tmp_path / "numpy.pth")
    assert load_official(classifier(), tmp_path / "numpy.pth").used == tuple(weights)


def test_an_array_of_objects_is_searched_for_hostile_ones(tmp_path):
    trace = tmp_path / "trace"
    array = np.empty(1, dtype=object)
    array[0] = Hostile(trace)
    torch.save({"model": to_official(classifier()), "extra": array}, tmp_path / "hostile.pth")
    assert_refused_unrun(tmp_path / "hostile.pth", trace)


def test_a_pickle_within_the_bytes_of_a_pickle_is_not_opened(tmp_path):
    weights, trace = to_official(classifier()), tmp_path / "trace"
    inner = io.BytesIO()
    np.save(inner, np.array([Hostile(trace)], dtype=object), allow_pickle=True)
    torch.save({"model": weights, "extra": [pickle.dumps(Hostile(trace)), inner.getvalue()]}, tmp_path / "bytes.pth")
    assert load_official(classifier(), tmp_path / "bytes.pth").used == tuple(weights)
    assert not trace.exists()


@pytest.mark.parametrize(
    "function", [eval, getattr, __import__, os.system, np.load, np.frombuffer, torch.load, Path.home]
)
def test_no_function_outside_the_list_is_called(tmp_path, function):
    torch.save({"model": to_official(classifier()), "extra": reduced(function, "x")}, tmp_path / "call.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_official(classifier(), tmp_path / "call.pth")


def test_the_class_that_is_refused_is_named(tmp_path):
    torch.save({"model": to_official(classifier()), "extra": nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"contains a torch\.nn\.modules\.linear\.Linear, which could run code"):
        load_official(classifier(), tmp_path / "module.pth")


def test_an_error_of_the_disk_is_not_called_damage(tmp_path):
    """Reading /proc/self/mem at 0 is an input/output error."""
    path = tmp_path / "weights.pth"
    path.symlink_to("/proc/self/mem")
    for read in (read_weights, read_header):
        with pytest.raises(OSError, match="Input/output error") as error:
            read(path)
        assert not isinstance(error.value, CheckpointError)


def test_the_format_follows_from_the_content_if_the_name_does_not_say_it(tmp_path):
    path = tmp_path / "weights.bin"
    safetensors.torch.save_file(to_official(classifier()), path)
    assert read_weights(path).entries.keys() == read_header(path).forms.keys() == to_official(classifier()).keys()
