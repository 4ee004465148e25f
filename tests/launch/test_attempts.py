"""What follows an attempt: the end, another one, or the error for good. SLURM is stood in for; see tests/slurm."""

import dataclasses
import errno
import json
from datetime import UTC, datetime, timedelta

import pytest

from launch.job import attempts
from launch.job.attempts import ATTEMPTS, FOLDERS, main
from launch.job.record import Record, now, read_record, write_record
from launch.slurm.client import slurm
from mvd.run_directory import RunDirectory


@pytest.fixture
def job(tmp_path, monkeypatch):
    """One element of an array, whose requeues are listed."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "24")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "26")
    folder = tmp_path / "stage"
    write_record(RunDirectory(folder), Record("24_1", str(tmp_path), now(), 1, ["row"], []))
    (tmp_path / FOLDERS).write_text(json.dumps([str(tmp_path / "other"), str(folder)]))
    requeued, excluded = [], []
    monkeypatch.setattr(slurm, "queue", lambda ids: {name: slurm.QueuedJob("RUNNING", "None", "1:00") for name in ids})
    monkeypatch.setattr(slurm, "requeue", lambda name: requeued.append(name) or "")
    monkeypatch.setattr(slurm, "exclude", lambda name, nodes: excluded.append((name, nodes)) or "")
    monkeypatch.setattr(slurm, "exclusion_error", lambda script, nodes: "" if nodes.count(",") < 2 else "too few")
    return Job(tmp_path, folder, requeued, excluded)


class Job:
    def __init__(self, submission, folder, requeued, excluded):
        self.submission, self.folder, self.requeued, self.excluded = submission, folder, requeued, excluded

    def attempt(self, code, saved=0, complete=False, error=None):
        """One attempt; returns the exit code of the job."""
        assert main(["begin", str(self.submission)]) == 0
        if saved:
            (self.folder / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
            (self.folder / "checkpoints" / f"step-{saved:08d}" / "manifest.json").touch()
        if complete:
            (self.folder / "result.json").touch()
        if error:
            (self.folder / "error.json").write_text(json.dumps({"lines": error, "final": error.startswith("error:")}))
        return main(["end", str(self.submission), str(code)])

    @property
    def record(self):
        return read_record(RunDirectory(self.folder))


def test_a_complete_stage_ends_its_job(job):
    assert job.attempt(0, complete=True) == 0
    assert job.requeued == [] and job.record.error is None and job.record.attempts[0].ended


def test_a_stage_that_was_told_to_stop_goes_on_as_often_as_it_takes(job):
    for number in range(1, 8):
        assert job.attempt(0, saved=number) == 1
    assert job.requeued == ["24_1"] * 7 and job.record.error is None and job.record.requeued == 6
    assert [attempt.saved for attempt in job.record.attempts] == [0, 1, 2, 3, 4, 5, 6]
    assert "stopped before a time limit" in job.record.attempts[0].error


def test_three_attempts_that_save_nothing_new_are_the_end(job):
    assert [job.attempt(1, saved=5, error="ValueError: first"), job.attempt(137)] == [1, 1]
    job.attempt(1, saved=9, error="ValueError: second")
    for _ in range(ATTEMPTS - 1):
        job.attempt(1, error="Traceback\nValueError: last")
    assert job.record.error is None and len(job.requeued) == 5
    assert job.attempt(1, error="Traceback\nValueError: last") == 1
    assert len(job.requeued) == 5
    assert job.record.error.startswith("3 attempts have saved nothing new; the last one:")
    assert job.record.error.splitlines()[-1] == "ValueError: last"
    assert "exit code 137, signal 9; no process said why" in job.record.attempts[1].error


def test_attempts_that_never_ended_do_not_count(job):
    for _ in range(5):  # the node was lost, or somebody requeued the job
        main(["begin", str(job.submission)])
    assert job.attempt(1) == 1
    assert job.record.error is None and job.requeued == ["24_1"]


def test_what_another_attempt_would_meet_too_ends_the_job_at_once(job):
    assert job.attempt(2, error="error: /data/train.csv holds no videos; mend it") == 1
    assert job.requeued == [] and "/data/train.csv holds no videos" in job.record.error


def test_an_error_of_an_earlier_attempt_is_forgotten(job):
    job.attempt(1, error="ValueError: first")
    job.attempt(137)
    assert "no process said why" in job.record.attempts[1].error


def test_a_cancelled_job_is_not_requeued(job, monkeypatch):
    monkeypatch.setattr(slurm, "queue", lambda ids: {"24_1": slurm.QueuedJob("COMPLETING", "None", "1:00")})
    assert job.attempt(143) == 1
    assert job.requeued == [] and job.record.error is None


def test_a_requeue_that_slurm_refuses_is_the_end(job, monkeypatch):
    monkeypatch.setattr(slurm, "requeue", lambda name: "Requested operation is presently disabled")
    job.attempt(0, saved=1)
    assert job.record.error.startswith("it could not be requeued (Requested operation is presently disabled)")


def fault(job, hosts, hours=0):
    """Notes a fault of so many hours ago."""
    time = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
    entry = {"time": time, "fault": "hang", "update": 1, "hosts": hosts, "message": "it hangs"}
    with open(job.folder / "faults.jsonl", "a") as handle:
        handle.write(json.dumps(entry) + "\n")


def test_a_machine_that_a_fault_has_named_is_avoided_for_a_day(job):
    write_record(RunDirectory(job.folder), dataclasses.replace(job.record, exclude="bad[1-3]"))
    fault(job, ["node4"], hours=25)
    fault(job, ["node2"], hours=23)
    with open(job.folder / "faults.jsonl", "a") as handle:
        handle.write('{"time": "2026\n')  # the disk was full
    job.attempt(76, saved=1)
    assert job.excluded == [("24_1", "bad[1-3],node2")] and job.record.avoided == ["node2"]
    job.attempt(0, saved=2)
    assert len(job.excluded) == 1 and len(job.requeued) == 2
    (job.folder / "faults.jsonl").unlink()
    job.attempt(0, saved=3)
    assert job.excluded[1:] == [("24_1", "bad[1-3]")] and job.record.avoided == []


def test_the_machine_named_last_is_avoided_where_the_job_cannot_do_without_all(job):
    for number in (1, 2, 3):
        fault(job, [f"node{number}"], hours=4 - number)
    job.attempt(76)
    assert job.excluded == [("24_1", "node3,node2")] and job.record.avoided == ["node3", "node2"]
    assert job.record.attempts[0].error.endswith("\nnode1 is not avoided: too few")


def test_an_exclusion_that_slurm_refuses_is_no_reason_to_give_up(job, monkeypatch):
    monkeypatch.setattr(slurm, "exclude", lambda name, nodes: "Invalid node name specified")
    fault(job, ["node2"])
    job.attempt(76)
    assert job.requeued == ["24_1"] and job.record.avoided == [] and job.record.error is None
    assert "node2 is not avoided: Invalid node name" in job.record.attempts[0].error


def test_a_full_disk_is_named(job, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "job.json")

    assert main(["begin", str(job.submission)]) == 0
    (job.folder / "error.json").write_text('{"rank": 0, "li')
    monkeypatch.setattr(attempts, "write_record", full)
    for verb in (["begin", str(job.submission)], ["end", str(job.submission), "1"]):
        assert main(verb) == 1
        assert "error: job.json: No space left on device; mend that, then" in capsys.readouterr().out


def test_a_job_that_is_not_the_stages_own_does_not_run(job, monkeypatch, capsys):
    monkeypatch.setattr(attempts, "SECONDS_FOR_RECORD", 0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "23")
    assert main(["begin", str(job.submission)]) == 1
    assert "job.json does not name job 23_1; run submit.py again" in capsys.readouterr().out
    assert job.record.attempts == []
