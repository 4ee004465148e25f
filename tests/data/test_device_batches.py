"""Micro-batches on their way to the device."""

import contextlib
from unittest.mock import Mock

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


class Gpu:
    """A GPU's queue in simulated time: what it is given to compute takes its time, one after the other."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.free_at = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time = 0.0

            def record(self, _) -> None:
                self.time = max(gpu.now, gpu.free_at)

            def query(self) -> bool:
                return self.time <= gpu.now

            def elapsed_time(self, other) -> float:
                return 1000 * (other.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Mock())
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Mock())

    def compute(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def finish(self) -> None:
        self.now = max(self.now, self.free_at)

    def batches(self, *waits: float) -> DeviceBatches:
        """Batches that each take so many seconds to come once they are asked for."""

        def source():
            for seconds in waits:
                self.now += seconds
                yield {"indices": torch.tensor([0])}

        return DeviceBatches(source(), torch.device("cuda"))


def test_a_gpu_waits_only_while_it_has_nothing_to_compute(monkeypatch):
    gpu = Gpu(monkeypatch)
    batches = gpu.batches(3.0, 0.25, 1.0, 1.5)
    next(batches)
    assert (batches.waited, batches.waited_ahead) == (3.0, 0.0)  # nothing to compute yet
    waited = []
    for _ in range(3):
        gpu.compute(1.0)
        batches.read_ahead()
        gpu.finish()
        next(batches)
        waited.append(batches.waited_ahead)
    assert waited == [0.0, 0.0, 0.5] and batches.waited == 3.5


def test_a_micro_batch_within_an_update_is_hidden_by_those_before_it(monkeypatch):
    gpu = Gpu(monkeypatch)
    batches = gpu.batches(0.0, 0.5)
    next(batches)
    gpu.compute(2.0)
    next(batches)
    assert batches.waited == 0.0  # the GPU has not come to it
    gpu.finish()
    assert batches.waited == 0.0


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
