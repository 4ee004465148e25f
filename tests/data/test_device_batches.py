"""Micro-batches on their way to the device."""

import pytest
import torch

from mvd.data.device_batches import DeviceBatches


def loader(asked: list[int]):
    """Three micro-batches, whose numbers are noted when they are asked for."""
    for number in range(3):
        asked.append(number)
        yield {"video": torch.full((2, 4), number, dtype=torch.uint8), "indices": torch.tensor([number])}


def test_on_a_cpu_nothing_is_read_ahead():
    asked: list[int] = []
    batches = DeviceBatches(loader(asked), torch.device("cpu"))
    for number in range(3):
        batches.read_ahead()
        assert len(asked) == number
        assert next(batches)["indices"].item() == number
    with pytest.raises(StopIteration):
        next(batches)


def test_the_time_of_reading_is_counted(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 11.5])
    monkeypatch.setattr("mvd.data.device_batches.time.monotonic", lambda: next(clock))
    batches = DeviceBatches(loader([]), torch.device("cpu"))
    next(batches), next(batches)
    assert batches.waited == 3.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_next_one_is_read_ahead_in_order():
    asked: list[int] = []
    batches = DeviceBatches(loader(asked), torch.device("cuda"))
    for number in range(3):
        batch = next(batches)
        batches.read_ahead()
        assert len(asked) == min(number + 2, 3)
        assert batch["video"].is_cuda and batch["video"].eq(number).all() and not batch["indices"].is_cuda
    with pytest.raises(StopIteration):
        next(batches)
