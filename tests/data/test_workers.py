"""Ending the worker processes of a loader."""

import multiprocessing
import time

from torch.utils.data import DataLoader

from mvd.data.workers import LOADER_START_METHOD, follow_parent, kill_workers


class Numbers:
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def test_workers_that_are_killed_on_purpose_are_no_error_of_the_loader():
    def start(_: int) -> None:
        follow_parent()

    loader = DataLoader(Numbers(), num_workers=2, worker_init_fn=start, multiprocessing_context=LOADER_START_METHOD)
    batches = iter(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    kill_workers()
    time.sleep(0.1)  # PyTorch's handler of SIGCHLD would raise here
    assert multiprocessing.active_children() == []
