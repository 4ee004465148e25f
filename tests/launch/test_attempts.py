"""What follows an attempt: the end, another one, or the error for good. SLURM is stood in for; see tests/slurm."""

import json

import pytest

from launch import attempts, slurm
from launch.attempts import ATTEMPTS, FOLDERS, main
from launch.record import Record, now, read_record, write_record


@pytest.fixture
def job(tmp_path, monkeypatch):
    """One element of an array, whose requeues are listed."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "24")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "26")
    folder = tmp_path / "stage"
    write_record(folder, Record("24_1", str(tmp_path), now(), 1, ["row"], []))
    (tmp_path / FOLDERS).write_text(json.dumps([str(tmp_path / "other"), str(folder)]))
    requeued = []
    monkeypatch.setattr(slurm, "queue", lambda ids: {name: slurm.QueuedJob("RUNNING", "None", "1:00") for name in ids})
    monkeypatch.setattr(slurm, "requeue", lambda name: requeued.append(name) or "")
    return Job(tmp_path, folder, requeued)


class Job:
    def __init__(self, submission, folder, requeued):
        self.submission, self.folder, self.requeued = submission, folder, requeued

    def attempt(self, code, saved=0, complete=False, error=None):
        """One attempt; returns the exit code of the job."""
        assert main(["begin", str(self.submission)]) == 0
        if saved:
            (self.folder / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
            (self.folder / "checkpoints" / f"step-{saved:08d}" / "manifest.json").touch()
        if complete:
            (self.folder / "result.json").touch()
        if error:
            (self.folder / attempts.ERROR).write_text(json.dumps({"lines": error, "final": error.startswith("error:")}))
        return main(["end", str(self.submission), str(code)])

    @property
    def record(self):
        return read_record(self.folder)


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


def test_a_job_that_is_not_the_stages_own_does_not_run(job, monkeypatch, capsys):
    monkeypatch.setattr(attempts, "SECONDS_FOR_RECORD", 0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "23")
    assert main(["begin", str(job.submission)]) == 1
    assert "job.json does not name job 23_1; run submit.py again" in capsys.readouterr().out
    assert job.record.attempts == []
