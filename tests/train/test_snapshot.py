"""The copy of the training state that is written in the background, and the files that it becomes."""

import hashlib
from collections import OrderedDict
from pathlib import Path

import torch

from mvd.train.checkpoint_writer import write_hashed
from mvd.train.safe_pickle import load_pickle
from mvd.train.snapshot import HostBuffers


def state(value: float) -> dict:
    weights = OrderedDict(weight=torch.full((3, 4), value), same=torch.full((2,), value, dtype=torch.int64))
    weights._metadata = {"": {"version": 1}}  # as of a module's state_dict
    return {"module": weights, "groups": [(torch.full((5,), value), {"lr": value, "names": ["weight"]})], "none": None}


def copied(buffers: HostBuffers, of: dict) -> dict:
    buffers.begin()
    return buffers.copy(of)


def test_a_snapshot_keeps_its_values_when_the_training_changes_the_original():
    original = state(1.0)
    snapshot = copied(HostBuffers(), original)
    original["module"]["weight"].add_(1)
    original["groups"][0][0].zero_()
    original["groups"][0][1]["names"].append("another")
    assert snapshot["module"]["weight"].eq(1).all() and snapshot["groups"][0][0].eq(1).all()
    assert snapshot["groups"][0][1] == {"lr": 1.0, "names": ["weight"]} and snapshot["none"] is None
    assert list(snapshot["module"]) == ["weight", "same"] and snapshot["module"]._metadata == {"": {"version": 1}}


def test_the_next_snapshot_uses_the_same_memory():
    buffers = HostBuffers()
    places = [copied(buffers, state(value))["module"]["weight"].data_ptr() for value in (1.0, 2.0)]
    assert places[0] == places[1]


def test_a_state_of_other_tensors_is_copied_all_the_same():
    buffers = HostBuffers()
    copied(buffers, state(1.0))
    grown = {"step": torch.tensor(3.0), **state(2.0)}
    snapshot = copied(buffers, grown)
    assert (
        snapshot["step"] == 3 and snapshot["groups"][0][0].eq(2).all() and snapshot["module"]["weight"].shape == (3, 4)
    )


def test_what_a_parameter_shares_with_another_is_copied_whole():
    flat = torch.arange(6.0)
    views = {"first": flat[:2], "rest": flat[2:]}
    snapshot = copied(HostBuffers(), views)
    assert snapshot["first"].tolist() == [0, 1] and snapshot["rest"].tolist() == [2, 3, 4, 5]


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path):
    content = {"weight": torch.arange(100_000.0), "step": 3}
    entry = write_hashed(tmp_path / "a.pt", content)
    written = (tmp_path / "a.pt").read_bytes()
    assert entry == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    for mmap in (False, True):
        loaded = load_pickle(tmp_path / "a.pt", mmap=mmap)
        assert loaded["weight"].equal(content["weight"]) and loaded["step"] == 3
