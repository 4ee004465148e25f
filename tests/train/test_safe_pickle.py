"""Pickles of run directories are read without running what is in them."""

import pickle
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.config import ConfigError
from mvd.train.random_state import random_state
from mvd.train.safe_pickle import is_safe, load_pickle


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_random_state_comes_back_as_it_was(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "rng.pt")
    assert is_safe(tmp_path / "rng.pt")
    loaded = load_pickle(tmp_path / "rng.pt")
    assert loaded["python"] == state["python"] and loaded["torch"].equal(state["torch"])
    np.testing.assert_array_equal(loaded["numpy"][1], state["numpy"][1])


@pytest.mark.parametrize("content", [Planted, lambda path: {"a": [Planted(path)]}, lambda _: deque([1])])
def test_anything_else_is_refused_and_not_run(content, tmp_path):
    torch.save(content(tmp_path / "it-ran"), tmp_path / "rng.pt")
    assert not is_safe(tmp_path / "rng.pt")
    with pytest.raises(ConfigError, match="rng.pt holds code or objects that no checkpoint of this project does"):
        load_pickle(tmp_path / "rng.pt")
    assert not (tmp_path / "it-ran").exists()


def test_a_plain_pickle_is_refused_too(tmp_path):
    (tmp_path / "rng.pt").write_bytes(pickle.dumps(Planted(tmp_path / "it-ran")))
    assert not is_safe(tmp_path / "rng.pt")
    with pytest.raises(ConfigError, match="holds code or objects"):
        load_pickle(tmp_path / "rng.pt")
    assert not (tmp_path / "it-ran").exists()
