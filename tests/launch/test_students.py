"""A job of two students of which one is complete, cancelled or fails for good; SLURM is stood in for."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from launch import cancel
from launch.job import attempts, students
from launch.job.attempts import REFUSED, main
from launch.job.record import Record, has_left, now, read_record, write_record
from launch.job.students import FOLDERS
from mvd.config import ConfigError
from mvd.files import write_json
from mvd.owner import VARIABLE, read_owner
from mvd.run_directory import RunDirectory


@pytest.fixture
def job(tmp_path, monkeypatch, fake_slurm):
    """Element 1 of array 24, with two students, each of which a fine-tuning waits for."""
    for name, value in (("SLURM_ARRAY_JOB_ID", "24"), ("SLURM_ARRAY_TASK_ID", "1"), ("SLURM_JOB_ID", "26")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempts, "SECONDS_AGAIN", 0)
    return Job(tmp_path, fake_slurm, monkeypatch)


class Job:
    def __init__(self, folder: Path, slurm, monkeypatch) -> None:
        self.runs, self.submission, self.slurm, self.monkeypatch = folder / "runs", folder / "jobs", slurm, monkeypatch
        self.small, self.large, *children = (
            RunDirectory(self.runs / name) for name in ("pretrain-small", "pretrain-large", "ft-small", "ft-large")
        )
        self.starts = 0
        self.submission.mkdir()
        write_json(self.submission / FOLDERS, [["other"], [str(self.small.path), str(self.large.path)]])
        names = {self.small.path.name, self.large.path.name}
        where = {"directory": str(self.submission), "warning_seconds": 300}
        for files in (self.small, self.large):
            others = sorted(names - {files.path.name})
            write_record(files, Record("24_1", str(self.submission), now(), 1, ["row"], [], together=others, **where))
        for index, (files, parent) in enumerate(zip(children, (self.small, self.large), strict=True)):
            write_record(files, Record(f"25_{index}", "", now(), 1, ["row"], [parent.path.name]))
            slurm.runs(f"25_{index}", "PENDING", "Dependency")
        slurm.runs("24_1", directory=str(self.submission))

    def begin(self) -> int:
        """Starts the next attempt; returns its exit code."""
        self.monkeypatch.setenv("MVD_START", str(self.starts))
        self.starts += 1
        self.monkeypatch.setenv(VARIABLE, f"24_1.0.{self.starts - 1}")
        return main(["begin", str(self.submission)])

    def end(self, code: int) -> tuple[int, bool]:
        """The exit code of the job, and whether its processes start again in place."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = main(["end", str(self.submission), str(code)])
        return code, "again" in printed.getvalue()

    @property
    def released(self) -> list[str]:
        return [job for *_, job, what in self.slurm.called("scontrol update") if what == "Dependency="]


def attempts_of(files: RunDirectory) -> int:
    return len(read_record(files).attempts)


def owners(*folders: RunDirectory) -> list[str | None]:
    found = [read_owner(files) for files in folders]
    return [owner and owner.name for owner in found]


def test_each_student_has_its_own_attempts_and_a_complete_one_is_left_out(job):
    assert job.begin() == 0
    assert owners(job.small, job.large) == ["24_1.0.0"] * 2
    assert read_owner(job.large).together == "pretrain-small,pretrain-large"
    job.small.result.touch()
    assert job.end(137) == (0, True)
    first, second = (read_record(files).attempts[-1] for files in (job.small, job.large))
    assert first.ended and first.error is None and "exit code 137" in second.error
    assert job.begin() == 0
    assert owners(job.small, job.large) == [None, "24_1.0.1"] and read_owner(job.large).together == "pretrain-large"
    job.large.result.touch()
    assert job.end(0) == (0, False)
    assert [attempts_of(files) for files in (job.small, job.large)] == [1, 2] and owners(job.large) == [None]


def test_the_child_of_a_complete_student_does_not_wait_for_the_other(job):
    job.begin()
    job.small.result.touch()
    students._leave(job.small, None)
    assert job.released == ["JobId=25_0"] and read_owner(job.small) is None
    record = read_record(job.small)
    assert record.attempts[0].ended and record.error is None
    assert job.end(137) == (0, True) and job.begin() == 0  # SLURM may not have answered before
    assert job.released == ["JobId=25_0"] * 2
    assert job.slurm.called("scancel") == []


def test_a_student_that_fails_leaves_alone_and_takes_its_children_along(job):
    job.begin()
    students._leave(job.small, "the loss was not finite")
    record = read_record(job.small)
    assert record.error == "the loss was not finite" and read_owner(job.small) is None
    assert has_left(job.small, record) and ("scancel", "25_0") in job.slurm.called("scancel")
    assert job.end(137) == (0, True) and job.begin() == 0
    assert owners(job.small, job.large) == [None, "24_1.0.1"]
    job.large.result.touch()
    assert job.end(2) == (1, False)  # with 0, the child would start, had it not been cancelled
    assert read_record(job.large).error is None


def test_three_attempts_without_progress_of_any_student_are_the_end_of_all(job):
    for number in (1, 2, 3, 4):
        job.begin()
        if number == 2:  # the others wait for it
            (job.large.checkpoints / "step-00000005").mkdir(parents=True)
            (job.large.checkpoints / "step-00000005" / "manifest.json").touch()
        assert job.end(137) == (0, True)
    job.begin()
    assert job.end(137) == (1, False)
    for files in (job.small, job.large):
        assert read_record(files).error.startswith("3 attempts have saved nothing new")
    assert job.begin() == 0 and owners(job.small, job.large) == ["24_1.0.5"] * 2  # somebody has requeued the job


def test_students_of_which_one_saves_are_not_given_up_at_their_time_limit(job):
    job.slurm.runs("24_1", directory=str(job.submission), left="4:00")
    for number in range(1, 5):
        job.starts = 0
        job.begin()
        (job.small.checkpoints / f"step-{number:08d}").mkdir(parents=True)
        (job.small.checkpoints / f"step-{number:08d}" / "manifest.json").touch()
        assert job.end(0) == (1, False)
    assert len(job.slurm.called("scontrol requeue")) == 4 and read_record(job.large).error is None


def test_a_job_that_somebody_requeues_after_its_end_trains_only_what_has_failed(job):
    job.begin()
    job.large.result.touch()
    students._leave(job.small, "the loss was not finite")
    assert job.end(2) == (1, False)
    assert job.begin() == 0 and owners(job.small, job.large) == ["24_1.0.1", None]


def test_children_that_run_already_are_left_alone(job):
    for child in ("25_0", "25_1"):
        job.slurm.runs(child)
    job.begin()
    job.small.result.touch()
    students._leave(job.small, None)
    students._leave(job.large, "the loss was not finite")
    assert job.released == [] and job.slurm.called("scancel") == []


def test_a_process_of_an_earlier_attempt_does_not_end_the_one_that_has_replaced_it(job):
    job.begin()
    job.monkeypatch.setenv(VARIABLE, "24_0.0.0")
    students._leave(job.small, "the loss was not finite")
    record = read_record(job.small)
    assert owners(job.small) == ["24_1.0.0"] and record.error is None and record.attempts[-1].ended is None


def test_a_blamed_host_is_avoided_whichever_student_names_it(job):
    job.begin()
    fault = {"time": now(), "fault": "hang", "update": 1, "hosts": ["node2"], "message": "it hangs"}
    job.large.append_fault(fault)
    assert job.end(76) == (1, False)
    assert job.slurm.called("scontrol requeue") == [("scontrol", "requeue", "24_1")]
    assert [read_record(files).avoided for files in (job.small, job.large)] == [["node2"]] * 2


def test_a_host_that_a_complete_student_has_named_is_avoided_too(job):
    job.begin()
    fault = {"time": now(), "fault": "audit", "update": 1, "hosts": ["node2"], "message": "wrong"}
    job.small.append_fault(fault)
    job.small.result.touch()
    assert job.end(76) == (1, False)
    assert job.slurm.called("scontrol requeue") and read_record(job.large).avoided == ["node2"]


def test_children_of_a_complete_student_start_although_slurm_has_not_let_them_go(job, monkeypatch):
    (job.runs / "old").mkdir()
    (job.runs / "old" / "job.json").write_text("{")  # of no interest here
    job.begin()
    students._leave(job.small, "the loss was not finite")
    job.large.result.touch()
    monkeypatch.setattr(students, "jobs_in_queue", silent)
    assert job.end(2) == (0, False)


def silent(_):
    raise ConfigError("squeue does not answer")


@pytest.fixture
def cancelled(job, monkeypatch):
    """Cancels stages by their names."""
    monkeypatch.setenv("MVD_CLUSTER", str(job.submission / "cluster.yaml"))
    (job.submission / "cluster.yaml").write_text(f"runs: {job.runs}\n")
    for files in job.runs.iterdir():
        (files / "stage.yaml").write_text("kind: pretrain\n")

    def run(*names: str) -> None:
        assert cancel.main(list(names)) == 0

    return run


def test_one_student_is_cancelled_and_the_other_goes_on(job, cancelled, capsys):
    job.begin()
    entry = {"owner": "24_1.0.0", "training": now(), "started": now()}
    job.small.provenance.write_text(json.dumps([entry]))
    cancelled("pretrain-small", "ft-small")
    assert "cancelled: pretrain-small, job 24_1, which goes on with the others" in capsys.readouterr().out
    assert job.slurm.called("scancel") == [("scancel", "25_0"), ("scancel", "--signal=USR1", "24_1")]
    assert owners(job.small, job.large) == [None, "24_1.0.0"]
    assert job.end(137) == (0, True) and job.begin() == 0
    assert owners(job.small, job.large) == [None, "24_1.0.1"] and attempts_of(job.small) == 1
    job.large.result.touch()
    assert job.end(0) == (0, False)


def test_a_student_is_cancelled_before_its_job_has_started(job, cancelled):
    cancelled("pretrain-small", "ft-small")
    assert job.slurm.called("scancel") == [("scancel", "25_0")]
    assert job.begin() == 0 and owners(job.small, job.large) == [None, "24_1.0.0"]


def test_cancelling_all_students_that_are_left_cancels_the_job(job, cancelled):
    job.begin()
    job.small.result.touch()
    cancelled("pretrain-large", "ft-large")
    assert job.slurm.called("scancel") == [("scancel", "24_1", "25_1")]


def test_a_record_of_a_student_that_is_submitted_again_meanwhile_is_kept(job, cancelled, monkeypatch):
    job.begin()

    def judge(*_):
        cancelled("pretrain-small", "ft-small")
        write_record(job.small, Record("30", str(job.runs / "elsewhere"), now(), 1, ["row"], []))

    monkeypatch.setattr(attempts, "judge", judge)
    job.end(137)
    assert read_record(job.small).job_id == "30" and read_record(job.large).attempts[-1].ended


def test_a_student_that_was_submitted_again_is_not_the_jobs_any_more(job, cancelled):
    cancelled("pretrain-small", "ft-small")
    write_record(job.small, Record("30", str(job.runs / "elsewhere"), now(), 1, ["row"], []))
    assert job.begin() == 0 and read_owner(job.large).together == "pretrain-large"
    write_record(job.large, Record("31", str(job.runs / "elsewhere"), now(), 1, ["row"], []))
    assert job.begin() == REFUSED
