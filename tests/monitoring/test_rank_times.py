"""The slowest process of an update, and when it becomes a fault."""

import pytest
import torch

from mvd.config.run_settings import Faults
from mvd.distributed.process import Process
from mvd.monitoring import rank_times
from mvd.monitoring.rank_times import SLOW_REPORTS, OwnTime, RankTimes
from tests.runs import small_stage, write_stage


@pytest.fixture
def make(monkeypatch, tmp_path):
    """RankTimes of three processes, of which this one is on `here`; the others' times are `others`."""

    def build(others: list[OwnTime], **limits) -> RankTimes:
        monkeypatch.setattr(rank_times, "gather", lambda _: ["here", "there", "behind"])
        monkeypatch.setattr(rank_times, "gather_numbers", lambda own, _: [own, *others])
        stage = small_stage("finetune", "run", tmp_path, tmp_path, faults=Faults(**limits))
        write_stage(stage)
        return RankTimes(stage, Process(0, 3, torch.device("cpu")))

    return build


def one_report(times: RankTimes, monkeypatch, update: int = 1) -> dict[str, float]:
    """Of two updates: one of 1 s, of which half is loading, and one of 3 s."""
    clock = iter([10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(rank_times.time, "perf_counter", lambda: next(clock))
    for loading in (0.5, 0.0):
        times.start()
        times.arrive()
        times.add(loading)
    return times.report(update)


def test_the_slowest_process_and_its_host_are_named(make, monkeypatch):
    times = make([OwnTime(2.5, 0.0), OwnTime(4.0, 3.0)])
    report = one_report(times, monkeypatch)
    assert report == {
        "speed/median_rank_seconds": 2.5,
        "speed/slowest_rank_seconds": 4.0,
        "speed/slowest_rank": 2,
        "speed/slowest_rank_data_share": 0.75,
    }
    assert times.straggler(report) == " (slowest: rank 2 on behind, 4.00 s, median 2.50 s)"
    assert "| 2 | behind |" in times.table()


def test_no_process_is_named_if_all_are_about_as_fast_or_nothing_was_measured(make):
    times = make([OwnTime(0.0, 0.0)] * 2)
    assert times.straggler({"speed/median_rank_seconds": 3.6, "speed/slowest_rank_seconds": 4.0}) == ""
    assert times.report(1) == {} and times.straggler({}) == ""


def test_what_the_next_batch_keeps_a_gpu_waiting_is_its_processes_own_time(make, monkeypatch):
    times = make([OwnTime(1.0, 0.0), OwnTime(1.0, 0.0)])
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(rank_times.time, "perf_counter", lambda: next(clock))
    times.start()
    times.arrive()
    times.add(0.75, afterwards=0.5)
    report = times.report(1)
    assert report["speed/slowest_rank"] == 0 and report["speed/slowest_rank_seconds"] == 1.5
    assert report["speed/slowest_rank_data_share"] == 0.5


@pytest.mark.parametrize(
    ("slow", "said"), [(OwnTime(4.0, 0.1), "in its computing"), (OwnTime(4.0, 2.0), "in waiting for its data")]
)
@pytest.mark.parametrize("avoid", [True, False])
def test_a_process_that_stays_slow_is_a_fault_that_names_host_and_phase(make, monkeypatch, slow, said, avoid):
    times = make([OwnTime(2.0, 0.1), slow], avoid_slow=avoid)
    for update in range(2 * SLOW_REPORTS):
        assert times.files.read_faults() == [] or update >= SLOW_REPORTS
        one_report(times, monkeypatch, update + 1)
    (fault,) = times.files.read_faults()
    assert (fault["fault"], fault["update"], fault["hosts"]) == ("slow", SLOW_REPORTS, ["behind"] if avoid else [])
    assert fault["message"].startswith("rank 2 on behind is slow: 4.000 s") and fault["message"].endswith(said)


def test_of_two_processes_the_slower_one_is_named(make, monkeypatch):
    times = make([OwnTime(4.0, 0.0)])
    for update in range(SLOW_REPORTS):
        report = one_report(times, monkeypatch, update + 1)
    assert report["speed/median_rank_seconds"] == 2.0
    assert times.straggler(report) == " (slowest: rank 1 on there, 4.00 s, median 2.00 s)"
    (fault,) = times.files.read_faults()
    assert fault["message"].startswith("rank 1 on there is slow: 4.000 s an update where the median is 2.000 s")


def test_a_pause_or_slow_factor_null_is_no_fault(make, monkeypatch):
    others = [OwnTime(2.0, 0.1), OwnTime(4.0, 0.1)]
    times = make(others)
    for update in range(2 * SLOW_REPORTS):
        others[1] = OwnTime(2.1 if update % 40 == 39 else 4.0, 0.1)
        one_report(times, monkeypatch, update + 1)
    assert times.files.read_faults() == []
    times = make([OwnTime(2.0, 0.1), OwnTime(40.0, 0.1)], slow_factor=None)
    for update in range(2 * SLOW_REPORTS):
        one_report(times, monkeypatch, update + 1)
    assert times.files.read_faults() == []
