"""What the time of a stage's jobs went into, from made records of its attempts."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from launch.job.record import Attempt, Record
from launch.job.time_use import seconds_of_restarts, time_use
from mvd.run_directory import RunDirectory

BEGIN = datetime(2026, 11, 29, tzinfo=UTC)


def at(seconds):
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def attempt(started, ended, **more):
    return Attempt("24", "node1", at(started), 0, at(ended), **more)


@pytest.fixture
def stage(tmp_path):
    """Three attempts in two allocations, the second of them in place; the result has 40 updates of a batch of 10.

    Allocation 1: 0 to 300 and 310 to 600; allocation 2: 900 to 1200. Each attempt takes 50 s to start.
    """
    attempts = [attempt(0, 300), attempt(310, 600, start=1), attempt(900, 1200, requeue=1)]
    entries = [
        {"owner": a.name, "started": at(n + 20), "training": at(n + 50)}
        for a, n in zip(attempts, (0, 310, 900), strict=True)
    ]
    entries[0]["ended"] = entries[1]["ended"] = at(555)  # the last sign of life; job.json knows better
    files = RunDirectory(tmp_path)
    files.provenance.write_text(json.dumps(entries))
    speed = {"samples_per_second": 1.0, "data_wait_share": 0.1}  # 10 s an update
    records = [{"update": update, "epoch": 1, "speed/save_seconds": 5.0, **speed} for update in (10, 20, 30, 40)]
    records.append({"update": 40, "epoch": 1, "speed/evaluation_seconds": 30.0})
    files.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return files, Record("24", "", at(-100), 1, [], [], attempts)


def test_every_second_of_the_allocations_is_accounted_for(stage):
    used = time_use(*stage, batch=10)
    assert used.allocated == 900  # 600 and 300, with the pause before the start in place
    assert (used.updates, used.data, used.saves, used.evaluations) == pytest.approx((360, 40, 20, 30))
    assert used.starts == 3 * 50 + 10 and used.queue == 100 + 300
    parts = used.updates + used.data + used.saves + used.evaluations + used.starts + used.lost
    assert parts == pytest.approx(used.allocated) and used.lost == pytest.approx(290)
    assert used.goodput == pytest.approx(0.4)


def test_an_attempt_that_never_trained_was_a_start(stage):
    files, record = stage
    record.attempts.append(attempt(1200, 1280, requeue=1, start=1))
    assert time_use(files, record, 10).starts == 3 * 50 + 10 + 80


def test_attempts_of_an_earlier_submission_count_by_what_training_noted_itself(stage):
    files, record = stage
    entries = json.loads(files.provenance.read_text())
    early = {"owner": "23.0.0", "started": at(-900), "training": at(-880), "ended": at(-500)}
    files.provenance.write_text(json.dumps([early, *entries]))
    assert time_use(files, record, 10).allocated == 900 + 400


def test_the_seconds_until_a_job_trains_again_in_place_and_after_a_requeue(stage):
    assert seconds_of_restarts(*stage) == {True: 60, False: 350}


def test_a_run_of_an_earlier_version_has_no_such_figures(tmp_path):
    files, record = RunDirectory(tmp_path), Record("24", "", at(0), 1, [], [], [attempt(0, 10)])
    assert time_use(files, record, 10) is None and seconds_of_restarts(files, record) == {}
    files.provenance.write_text(json.dumps([{"started": at(0), "ended": at(10)}]))
    assert time_use(files, record, 10) is None


def test_an_attempt_that_runs_counts_until_it_last_wrote_something(stage):
    files, record = stage
    record.attempts[-1].ended = None
    os.utime(files.metrics, (BEGIN.timestamp() + 1100,) * 2)
    used = time_use(files, record, 10)
    assert used.allocated == 600 + 200 and used.goodput == pytest.approx(360 / 800) and used.queue == 100 + 300


def test_nothing_is_queued_between_two_submissions(stage):
    files, record = stage
    own = [attempt(-9000, -8000), *record.attempts]
    own[0].job_id = "23"
    entries = [{"owner": own[0].name, "started": at(-9000), "training": at(-8900), "ended": at(-8000)}]
    files.provenance.write_text(json.dumps(entries + json.loads(files.provenance.read_text())))
    assert time_use(files, record, 10).queue == 100 + 300
    record.job_id = "local-7"
    assert time_use(files, record, 10).queue == 300
