"""Loaders whose workers do not start at once, or not at all."""

import logging
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from mvd.data import started_loader
from mvd.data.started_loader import StartedLoader


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


class Starts:
    """Sets up worker 1, which hangs as often as asked; every start leaves a file."""

    def __init__(self, folder: Path, hanging: int) -> None:
        self.folder, self.hanging = folder, hanging

    def __call__(self, number: int) -> None:
        if number == 1:
            before = len(list(self.folder.iterdir()))
            (self.folder / str(before)).touch()
            while before < self.hanging:
                time.sleep(1)


def loader(folder: Path, hanging: int) -> StartedLoader:
    return StartedLoader(Numbers(), batch_size=2, num_workers=2, worker_init_fn=Starts(folder, hanging))


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_worker_that_hangs_at_its_start_is_replaced(hanging, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(started_loader, "START_SECONDS", 2.0)
    with caplog.at_level(logging.WARNING):
        batches = list(loader(tmp_path, hanging))
    assert torch.cat(batches).tolist() == list(range(8))
    assert len(list(tmp_path.iterdir())) == hanging + 1
    assert len(caplog.records) == hanging


def test_workers_that_never_start_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(started_loader, "START_SECONDS", 0.5)
    monkeypatch.setattr(started_loader, "STARTS", 1)
    with pytest.raises(RuntimeError, match=r"DataLoader workers have not started within 0.5 s \(tries: 1\)"):
        iter(loader(tmp_path, 10))


def test_the_error_of_a_worker_that_dies_at_its_start_is_shown_at_once():
    def fails(_: int) -> None:
        raise ValueError("no such library")

    made = StartedLoader(Numbers(), batch_size=2, num_workers=1, worker_init_fn=fails)
    with pytest.raises(ValueError, match="no such library"):
        list(made)
