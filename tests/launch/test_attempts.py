"""What follows an attempt: the end, another one, or the final error. SLURM is stood in for; see tests/slurm."""

import contextlib
import dataclasses
import errno
import io
import json
from datetime import UTC, datetime, timedelta

import pytest

from launch.job import attempts
from launch.job.attempts import REFUSED, main
from launch.job.record import Record, now, read_record, write_record
from launch.job.students import FOLDERS
from launch.job.verdict import MAX_FAILED_ATTEMPTS
from launch.slurm.client import PATIENT
from mvd.host import hostname
from mvd.owner import Owner, read_owner, take
from mvd.run_directory import RunDirectory
from tests.launch.fake_slurm import BUSY

ONE_SHORT_OF_A_FAILURE = len(PATIENT)  # tries that fail before the last one


@pytest.fixture
def job(tmp_path, monkeypatch, fake_slurm):
    """One element of an array, which SLURM says is running."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "24")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "26")
    monkeypatch.setattr(attempts, "SECONDS_AGAIN", 0)
    folder = tmp_path / "stage"
    record = Record("24_1", str(tmp_path), now(), 1, ["row"], [], directory=str(tmp_path))
    write_record(RunDirectory(folder), record)
    (tmp_path / FOLDERS).write_text(json.dumps([[str(tmp_path / "other")], [str(folder)]]))
    fake_slurm.runs("24_1", directory=str(tmp_path))
    return Job(tmp_path, RunDirectory(folder), fake_slurm, monkeypatch)


class Job:
    def __init__(self, submission, files, slurm, monkeypatch):
        self.submission, self.files, self.slurm, self.monkeypatch = submission, files, slurm, monkeypatch
        self.restarts = self.start = 0
        self.printed = ""  # by the last command, for the batch script

    def attempt(self, code, saved=0, complete=False, **failure):
        """One attempt; returns the exit code of the job. failure: what a process leaves in error.json."""
        assert self.begin() == 0
        if saved:
            (self.files.checkpoints / f"step-{saved:08d}").mkdir(parents=True)
            (self.files.checkpoints / f"step-{saved:08d}" / "manifest.json").touch()
        if complete:
            self.files.result.touch()
        if failure:
            self.files.error.write_text(json.dumps({"final": False, "signal": None, **failure}))
        return self.end(code)

    def begin(self):
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.restarts))
        self.monkeypatch.setenv("MVD_START", str(self.start))
        return self.main("begin")

    def end(self, code):
        left = self.main("end", str(code))
        self.restarts, self.start = (self.restarts, self.start + 1) if self.printed else (self.restarts + 1, 0)
        return left

    def main(self, verb, *more):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = main([verb, str(self.submission), *more])
        self.printed = printed.getvalue().strip()
        return code

    @property
    def record(self):
        return read_record(self.files)

    @property
    def requeues(self):
        return [job for *_, job in self.slurm.called("scontrol requeue")]

    @property
    def exclusions(self):
        return [(job.partition("=")[2], nodes.partition("=")[2]) for *_, job, nodes in self.slurm.called(UPDATE)]


UPDATE = "scontrol update"


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "job.json")


def test_a_complete_stage_ends_its_job(job):
    assert job.attempt(0, complete=True) == 0
    assert job.requeues == [] and job.record.error is None and job.record.attempts[0].ended
    assert read_owner(job.files) is None


def test_a_stage_that_was_told_to_stop_goes_on_as_many_times_as_needed(job):
    for number in range(1, 8):
        assert job.attempt(0, saved=number) == 1
    assert job.requeues == ["24_1"] * 7 and job.record.error is None and job.record.requeued == 6
    assert [attempt.saved for attempt in job.record.attempts] == [0, 1, 2, 3, 4, 5, 6]
    assert "stopped before a time limit" in job.record.attempts[0].error and job.record.attempts[0].stopped


def test_three_attempts_that_save_nothing_new_are_the_end(job):
    assert [job.attempt(1, saved=5, lines="ValueError: first"), job.attempt(137)] == [0, 0]
    job.attempt(1, saved=9, lines="ValueError: second")
    for _ in range(MAX_FAILED_ATTEMPTS - 1):
        job.attempt(1, lines="Traceback\nValueError: last")
    assert job.record.error is None and job.printed == "again"
    assert job.attempt(1, lines="Traceback\nValueError: last") == 1
    assert job.requeues == [] and job.printed == "" and job.record.restarted == 5 and job.record.requeued == 0
    assert job.record.error.startswith("3 attempts have saved nothing new; the last one:")
    assert job.record.error.splitlines()[-1] == "ValueError: last"
    assert "exit code 137, signal 9; no process reported an error" in job.record.attempts[1].error


def test_attempts_that_never_ended_do_not_count(job):
    for restarts in range(5):  # the node was lost, or somebody requeued the job
        job.restarts = restarts
        job.begin()
    assert job.end(1) == 0
    assert job.record.error is None and job.printed == "again"


@pytest.mark.parametrize(
    ("code", "failure", "preempted"),
    [
        (0, {}, False),  # told to stop before the first update
        (75, {"lines": "told to stop by SIGUSR2 while starting", "signal": "SIGUSR2"}, False),
        (140, {}, False),  # before there was a handler
        (75, {"lines": "told to stop by SIGTERM while starting", "signal": "SIGTERM"}, True),
        (143, {}, True),
    ],
)
def test_being_stopped_from_outside_is_never_an_attempt_without_progress(job, code, failure, preempted):
    for _ in range(3 * MAX_FAILED_ATTEMPTS):
        when = "2026-11-25T03:00:00" if preempted else "None"
        job.slurm.says("scontrol show job", f"JobId=26 PreemptTime={when}\n")
        job.attempt(code, **failure)
    assert job.record.error is None and len(job.requeues) == 3 * MAX_FAILED_ATTEMPTS
    job.attempt(1, lines="ValueError")
    job.attempt(1, lines="ValueError")
    assert job.record.error is None


def test_attempts_that_save_nothing_before_their_time_limit_are_the_end(job):
    def attempts_at_limit(count, **saved):
        for _ in range(count):
            job.slurm.runs("24_1", directory=str(job.submission), left="0:40")
            yield job.attempt(0, **saved)

    assert list(attempts_at_limit(MAX_FAILED_ATTEMPTS - 1)) == [1, 1]
    job.slurm.runs("24_1", directory=str(job.submission), left="9:00:00")
    job.attempt(0)  # preempted, which says nothing about the limit
    assert list(attempts_at_limit(1, saved=4)) == [1]
    assert list(attempts_at_limit(MAX_FAILED_ATTEMPTS - 1)) == [1, 1]
    assert job.record.error is None and len(job.requeues) == 6
    assert list(attempts_at_limit(1)) == [1] and len(job.requeues) == 6
    assert job.record.error.startswith("3 attempts have come to their time limit without saving anything new; raise")
    assert read_owner(job.files) is None


@pytest.mark.parametrize("failure", [{}, {"lines": "told to stop by SIGTERM while starting", "signal": "SIGTERM"}])
def test_the_sigterm_that_srun_sends_after_a_death_is_not_from_outside(job, failure):
    for _ in range(MAX_FAILED_ATTEMPTS):
        job.slurm.says("scontrol show job", "JobId=26 PreemptTime=None\n")
        job.attempt(143, **failure)
    assert job.record.error is not None


def test_what_another_attempt_would_meet_too_ends_the_job_at_once(job):
    assert job.attempt(2, lines="error: /data/train.csv holds no videos", final=True) == 1
    assert job.requeues == [] and "/data/train.csv holds no videos" in job.record.error


def test_a_copy_of_a_checkpoint_beside_the_others_does_not_end_the_job(job):
    for name in ("step-00000009", "step-00000009.bak"):
        (job.files.checkpoints / name).mkdir(parents=True)
        (job.files.checkpoints / name / "manifest.json").touch()
    assert job.attempt(137) == 0
    assert job.printed == "again" and job.record.attempts[0].saved == 9


def test_an_error_of_an_earlier_attempt_is_forgotten(job):
    job.attempt(1, lines="ValueError: first")
    job.attempt(137)
    assert "no process reported an error" in job.record.attempts[1].error


def test_a_fault_of_an_earlier_attempt_does_not_explain_this_one(job):
    earlier = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="seconds")
    job.files.append_fault({"time": earlier, "fault": "hang", "update": 1, "hosts": [], "message": "node2 hangs"})
    job.attempt(1)
    assert job.record.attempts[0].error == "a process ended with exit code 1; no process reported an error"


def test_a_cancelled_job_is_not_requeued(job):
    job.slurm.runs("24_1", "COMPLETING", directory=str(job.submission))
    assert job.attempt(143) == 1
    assert job.requeues == [] and job.record.error is None


@pytest.mark.parametrize("reason", ["Cleaning", "BeginTime", "JobHeldUser"])
def test_a_job_that_somebody_else_requeued_is_left_alone_while_slurm_cleans_up(job, reason):
    job.begin()
    job.slurm.runs("24_1", "COMPLETING", reason, directory=str(job.submission))
    attempts.end_without_batch_script([job.files])
    assert job.requeues == [] and job.record.error is None and job.record.attempts[0].ended is None


@pytest.mark.parametrize("reason", ["JobLaunchFailure", "RaisedSignal:9(Killed)", "TimeLimit"])
def test_a_job_that_slurm_ends_is_requeued_before_it_is_gone(job, reason):
    job.begin()
    job.slurm.runs("24_1", "COMPLETING", reason, directory=str(job.submission))
    attempts.end_without_batch_script([job.files])
    assert job.requeues == ["24_1"] and job.record.attempts[0].stopped


def test_a_job_that_starts_again_after_its_error_is_requeued_as_any_other(job):
    assert job.attempt(2, lines="error: no videos", final=True) == 1
    assert job.record.error is not None and job.requeues == []
    assert job.attempt(0, saved=1) == 1  # the cause is gone, and a person has requeued the job
    assert job.record.error is None and job.requeues == ["24_1"]


def test_a_requeue_that_slurm_refuses_is_the_end(job):
    job.slurm.fails("scontrol requeue", "Requested operation is presently disabled")
    job.attempt(0, saved=1)
    assert job.record.error.startswith("it could not be requeued (Requested operation is presently disabled)")


def test_a_controller_that_restarts_does_not_end_the_job(job):
    job.begin()
    job.slurm.fails("squeue", times=ONE_SHORT_OF_A_FAILURE)
    job.slurm.fails("scontrol requeue", "slurm_load_jobs error: Unable to contact slurm controller", times=5)
    assert job.end(0) == 1
    assert job.record.error is None and len(job.requeues) == 6
    assert job.slurm.pauses == [*PATIENT, *PATIENT[:5]]


def test_a_silent_squeue_is_no_reason_not_to_requeue(job):
    job.begin()
    job.slurm.fails("squeue", times=len(PATIENT) + 1)
    assert job.end(1) == 1
    assert job.record.error is None and job.requeues == ["24_1"]


def test_a_requeue_whose_answer_was_lost_is_no_failure(job):
    def requeued(_):
        job.slurm.runs("24_1", "PENDING", directory=str(job.submission))

    job.begin()
    job.slurm.fails("scontrol requeue", times=1)
    job.slurm.fails("scontrol requeue", "Job is pending execution for job 24_1")
    job.monkeypatch.setattr(type(attempts.slurm), "sleep", staticmethod(requeued))
    job.end(0)
    assert job.record.error is None and len(job.requeues) == 2


def test_a_full_disk_at_the_end_does_not_prevent_the_requeue(job, capsys):
    job.begin()
    job.files.error.write_text('{"rank": 0, "li')
    job.monkeypatch.setattr(attempts, "write_record", full)
    assert job.end(0) == 1
    assert job.requeues == ["24_1"]
    assert "job.json: [Errno 28] No space left on device: 'job.json'; going on" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_record_that_cannot_be_read_does_not_prevent_the_requeue(job, damage):
    job.begin()
    damage(job.files.job)
    assert job.end(1) == 1
    assert job.requeues == ["24_1"]


def test_the_start_waits_for_room_on_the_disk(job, capsys):
    waits = []
    write = attempts.write_record

    def slept(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            job.monkeypatch.setattr(attempts, "write_record", write)

    job.monkeypatch.setattr(attempts, "write_record", full)
    job.monkeypatch.setattr(attempts.time, "sleep", slept)
    assert job.begin() == 0
    assert waits == [1, 2, 5] and len(job.record.attempts) == 1
    assert "=== job.json: No space left on device; waiting for the disk" in capsys.readouterr().err


def test_a_disk_that_refuses_for_good_is_reported(job, capsys):
    def forbidden(*_):
        raise OSError(errno.EACCES, "Permission denied", "job.json")

    job.monkeypatch.setattr(attempts, "write_record", forbidden)
    assert job.begin() == REFUSED
    assert "error: job.json: Permission denied; fix that, then run submit.py again" in capsys.readouterr().err


def fault(job, hosts, hours=0):
    """Records a fault of so many hours ago."""
    time = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
    entry = {"time": time, "fault": "hang", "update": 1, "hosts": hosts, "message": "it hangs"}
    with open(job.files.faults, "a") as handle:
        handle.write(json.dumps(entry) + "\n")


def test_a_host_that_a_fault_is_blamed_on_is_avoided_for_a_day(job):
    write_record(job.files, dataclasses.replace(job.record, exclude="bad[1-3]"))
    fault(job, ["node4"], hours=25)
    fault(job, ["node2"], hours=23)
    with open(job.files.faults, "a") as handle:
        handle.write('{"time": "2026\n')  # the disk was full
    job.attempt(0, saved=1)
    assert job.exclusions == [("24_1", "bad[1-3],node2")] and job.record.avoided == ["node2"]
    job.attempt(0, saved=2)
    assert len(job.exclusions) == 1 and len(job.requeues) == 2
    job.files.faults.unlink()
    job.attempt(0, saved=3)
    assert job.exclusions[1:] == [("24_1", "bad[1-3]")] and job.record.avoided == []


def test_the_host_blamed_last_is_avoided_if_the_job_needs_the_others(job):
    for number in (1, 2, 3):
        fault(job, [f"node{number}"], hours=4 - number)
    job.slurm.fails("sbatch --test-only", "too few")
    job.attempt(0)
    assert job.exclusions == [("24_1", "node3,node2")] and job.record.avoided == ["node3", "node2"]
    assert job.record.attempts[0].error.endswith("\nnode1 is not avoided: too few")


def test_an_exclusion_that_slurm_refuses_does_not_end_the_job(job):
    job.slurm.fails(UPDATE, "Invalid node name specified")
    fault(job, ["node2"])
    job.attempt(0)
    assert job.requeues == ["24_1"] and job.record.avoided == [] and job.record.error is None
    assert "node2 is not avoided: Invalid node name" in job.record.attempts[0].error


def test_a_job_that_is_not_the_stages_own_does_not_run(job, capsys):
    job.monkeypatch.setattr(attempts, "SECONDS_FOR_RECORD", 0)
    job.monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "23")
    assert job.begin() == REFUSED
    assert "job.json is not of job 23_1; run submit.py again" in capsys.readouterr().err
    assert job.record.attempts == [] and read_owner(job.files) is None


def test_an_attempt_owns_the_run_directory_until_it_ends(job):
    job.begin()
    owner = read_owner(job.files)
    assert (owner.name, owner.host, owner.directory) == ("24_1.0.0", hostname(), str(job.submission)) and owner.port
    job.end(0)
    assert read_owner(job.files) is None
    job.begin()
    assert read_owner(job.files).name == "24_1.1.0"
    job.end(1)
    assert read_owner(job.files).name == "24_1.1.0"  # nobody else may take the directory before the next start
    job.begin()
    assert read_owner(job.files).name == "24_1.1.1"


def test_a_second_owner_stops_before_it_writes_anything(job, capsys):
    job.slurm.runs("7")
    take(job.files, Owner("7", 0, "node9", "2026-01-01"), lambda _: False)
    job.files.error.touch()
    content = {path: path.read_bytes() for path in job.files.path.iterdir()}
    assert job.begin() == REFUSED
    assert "belongs to job 7, attempt 1, on node9 since 2026-01-01; cancel that first" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in job.files.path.iterdir()} == content


def test_an_owner_that_slurm_does_not_know_any_more_is_taken_over(job):
    take(job.files, Owner("7", 0, "node9", "2026-01-01"), lambda _: False)
    job.slurm.history["7"] = ("NODE_FAIL", "")
    assert job.begin() == 0 and read_owner(job.files).job == "24_1"


def test_an_attempt_that_was_replaced_neither_writes_nor_requeues(job, capsys):
    job.begin()
    job.restarts = 1  # its node was cut off, and SLURM has started the job elsewhere
    job.begin()
    job.monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    before = job.files.job.read_text()
    assert job.end(1) == 1
    assert job.requeues == [] and job.files.job.read_text() == before and read_owner(job.files).name == "24_1.1.0"
    assert "this attempt leaves it alone" in capsys.readouterr().err


def test_a_node_without_scontrol_is_found_at_the_first_start(job, capsys):
    job.slurm.missing.add("scontrol")
    assert job.begin() == REFUSED
    assert f"there is no scontrol on {hostname()}, so the job could not go back into" in capsys.readouterr().err
    assert job.record.attempts == []


def test_a_node_without_scontrol_leaves_the_requeue_to_slurm_if_that_is_set_up(job):
    job.slurm.missing.add("scontrol")
    write_record(job.files, dataclasses.replace(job.record, requeue_exit=99))
    assert job.attempt(0, saved=1) == 99
    assert job.record.error is None and job.requeues == [] and read_owner(job.files) is None
    assert job.attempt(2, lines="error: no videos", final=True) == 1


def test_every_attempt_chooses_a_port_of_its_own(job):
    ports = set()
    for _ in range(4):
        job.begin()
        ports.add(read_owner(job.files).port)
        job.end(0)
    assert len(ports) > 1


def test_an_unknown_error_of_squeue_counts_as_silence(job):
    job.begin()
    job.slurm.fails("squeue", f"some plugin: {BUSY[:10]} failed")
    job.end(137)
    assert job.requeues == ["24_1"]


def test_a_refusal_that_has_nothing_to_do_with_the_hosts_does_not_keep_a_blamed_one(job):
    fault(job, ["node7"])
    job.slurm.fails("sbatch --test-only", "QOSMaxSubmitJobPerUserLimit", times=9)
    job.attempt(0)
    assert job.exclusions == [("24_1", "node7")] and job.record.avoided == ["node7"]


def test_a_log_on_a_full_disk_prevents_neither_the_start_nor_the_requeue(job):
    def freed(_):
        job.monkeypatch.setattr(attempts, "write_record", write_record)

    with open("/dev/full", "wb", buffering=0) as full_disk:
        job.monkeypatch.setattr("sys.stderr", io.TextIOWrapper(full_disk, write_through=True))  # as `python -u`
        job.monkeypatch.setattr(attempts, "write_record", full)
        job.monkeypatch.setattr(attempts.time, "sleep", freed)
        job.monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        assert main(["begin", str(job.submission)]) == 0
        assert main(["end", str(job.submission), "0"]) == 1
    assert job.requeues == ["24_1"]


def test_an_error_of_our_own_at_the_end_of_an_attempt_does_not_end_the_stage(job, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise RuntimeError("a fault of the launcher")

    assert job.begin() == 0
    monkeypatch.setattr(attempts, "judge", fails)
    assert job.end(0) == 1 and job.requeues == ["24_1"]
    assert "a fault of the launcher" in capsys.readouterr().err
