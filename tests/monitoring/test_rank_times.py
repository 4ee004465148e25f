"""The slowest process of an update."""

import pytest
import torch

from mvd.distributed.process import Process
from mvd.monitoring import rank_times
from mvd.monitoring.rank_times import RankTimes


@pytest.fixture
def times(monkeypatch) -> RankTimes:
    """Of two processes, of which this one is on `here`; the other takes as long as `others` says."""
    monkeypatch.setattr(
        rank_times, "gather", lambda value: ["here", "there"] if isinstance(value, str) else [value, 4.0]
    )
    return RankTimes(Process(0, 2, torch.device("cpu")))


def test_the_slowest_process_and_its_host_are_named(times, monkeypatch):
    clock = iter([10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(rank_times.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        times.start()
        times.arrive()
        times.add()
    report = times.report()
    assert report == {
        "speed/mean_rank_seconds": 3.0,
        "speed/slowest_rank_seconds": 4.0,
        "speed/slowest_rank": 1,
    }
    assert times.straggler(report) == " (slowest: rank 1 on there, 4.00 s, mean 3.00 s)"
    assert "| 1 | there |" in times.table()


def test_no_process_is_named_if_all_are_about_as_fast_or_nothing_was_measured(times):
    assert times.straggler({"speed/mean_rank_seconds": 3.6, "speed/slowest_rank_seconds": 4.0}) == ""
    assert times.report() == {} and times.straggler({}) == ""
