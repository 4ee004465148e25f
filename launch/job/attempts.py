"""Run by a job's batch script before and after its processes: records each attempt, and decides what follows it.

    python -m launch.job.attempts begin|end <folder of the submission> [exit code of srun]

A job that was told to stop, and one whose process died, goes back into the queue under its id, as many times as needed,
and avoids the hosts that its faults were blamed on. After MAX_FAILED_ATTEMPTS attempts without a new checkpoint the job
is given up and its error written to job.json; attempts that were told to stop do not count.

SLURM and the disk may fail for some minutes without ending the job: questions are repeated, the start waits for the
disk, and the requeue at the end does not depend on it.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launch.job.disk import try_to, with_disk
from launch.job.log import say
from launch.job.ownership import is_gone
from launch.job.record import Attempt, Record, now, read_record, write_record
from launch.job.rendezvous import free_port
from launch.job.verdict import blame_dead_tasks, explain_exit, step_state
from launch.slurm.client import PATIENT, slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from mvd.config import ConfigError
from mvd.distributed.exit_codes import STOPPED
from mvd.host import hostname
from mvd.owner import Owner, give_back, read_owner, take
from mvd.run_directory import RunDirectory

FOLDERS = "folders.json"  # of the submission: the record's folder of each element of the array
REFUSED = 3  # exit code of a start that another one would not improve; Python's own after a crash is 1
MAX_FAILED_ATTEMPTS = 3  # in a row, with nothing new saved
ERROR_LINES = 5
SECONDS_FOR_RECORD = 600.0  # the launcher writes job.json when sbatch has answered
KILLED_BY_USR2, KILLED_BY_TERM = 128 + signal.SIGUSR2, 128 + signal.SIGTERM  # before a process could handle them


def job_id() -> str:
    """This job's id as SLURM shows it: `24`, or `24_3` in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def begin(files: RunDirectory) -> None:
    """Makes this attempt the owner of the run directory and records it.

    Raises:
        ConfigError: job.json is not of this job, another attempt owns the directory, or the job could not be requeued.
    """
    record = _wait_for_record(files)
    _check_requeue(record)
    owner = Owner(job_id(), restarts(), hostname(), now(), free_port(), record.directory)
    with_disk(lambda: take(files, owner, is_gone))
    with_disk(lambda: files.error.unlink(missing_ok=True))
    record.error = None  # of an attempt after which somebody else requeued the job
    record.attempts.append(Attempt(job_id(), owner.host, owner.started, files.progress()))
    with_disk(lambda: write_record(files, record))


def _wait_for_record(files: RunDirectory) -> Record:
    deadline = time.monotonic() + SECONDS_FOR_RECORD
    while (record := with_disk(lambda: read_record(files))) is None or record.job_id != job_id():
        if time.monotonic() > deadline:
            raise ConfigError(f"{files.job} is not of job {job_id()}; run submit.py again")
        time.sleep(0.2)
    return record


def _check_requeue(record: Record) -> None:
    """Fails now rather than at the first time limit."""
    if not slurm.has("scontrol") and record.requeue_exit is None:
        raise ConfigError(
            f"there is no scontrol on {hostname()}, so the job could not go back into the queue at its time limit; "
            "install SLURM's clients on the compute nodes, load them in slurm.setup, or set RequeueExit in slurm.conf"
        )


def end(files: RunDirectory, code: int, reason: str = "") -> int:
    """Records how the attempt ended, and requeues the job unless the stage is complete or has failed.

    reason: why it ended, if the exit code does not say that. Returns the exit code of the job, which decides whether
    its children start.
    """
    owner = _owner(files)
    if owner is not None and (owner.job, owner.attempt) != (job_id(), restarts()):
        say(f"=== {files.path} belongs to {owner}; this attempt leaves it alone")
        return 1
    record = _own_record(files)
    attempt = record.attempts[-1]
    attempt.ended = now()
    complete = code == 0 and bool(try_to(files.result.name, files.result.exists))
    if not complete:
        _judge(files, code, record)
        attempt.error = reason or attempt.error
    _try_to_write(files, record)  # now, since SLURM gives a requeued job a few seconds only
    try_to("owner.json", lambda: give_back(files, owner) if owner else None)
    if complete:
        return 0
    say(f"=== {record.error or attempt.error}")
    result = 1
    state = _state() if record.error is None else "GONE"
    if state in ("RUNNING", None):
        result = _requeue(files, record, asks=state is not None)
        _try_to_write(files, record)
    return result


def end_without_batch_script(files: RunDirectory) -> None:
    """Do what the batch script does after the processes, if SLURM ends the job because the script alone has died.

    SLURM then sends SIGTERM to the processes and shows the job as COMPLETING until they have left (KillWait at most). A
    requeue before that keeps the job's id, and so the jobs that depend on it. Called by rank 0 once it has saved.
    """
    try:
        job = slurm.queue([job_id()]).get(job_id())
    except ConfigError as error:
        say(f"=== {error}")
        return
    if job is not None and job.lost_batch_script:
        end(files, 0, f"SLURM ended the job, since its batch script alone was killed ({job.reason})")


def _owner(files: RunDirectory) -> Owner | None:
    try:
        return read_owner(files)
    except (ConfigError, OSError) as error:
        say(f"=== {error}")
        return None


def _own_record(files: RunDirectory) -> Record:
    """The record; if the disk does not give it, or it is another job's, one that allows the job to be requeued."""
    try:
        record = read_record(files)
    except (ConfigError, OSError) as error:
        say(f"=== {error}")
        record = None
    if record is not None and record.job_id == job_id() and record.attempts:
        return record
    attempt = Attempt(job_id(), hostname(), now(), -1)
    return Record(job_id(), "", now(), 1, [], [], [attempt])


def _judge(files: RunDirectory, code: int, record: Record) -> None:
    """Says in the record why the attempt ended, and whether that is the end of the stage."""
    attempt, failure = record.attempts[-1], _failure(files)
    attempt.stopped = _was_stopped(code, failure)
    crash = try_to("log", lambda: blame_dead_tasks(files.whole, record.log))  # the others' errors only follow from it
    said = crash or (failure["lines"] if failure else _last_fault(files, attempt.started))
    attempt.error = _reason(code, said, explain_exit(code, step_state(record.log())))
    saved = try_to("checkpoints", files.progress)
    without_progress = [a for a in record.attempts if a.ended and not a.stopped and a.saved == saved]
    if failure and failure.get("final"):
        record.error = attempt.error
    elif len(without_progress) >= MAX_FAILED_ATTEMPTS and not attempt.stopped:
        record.error = f"{len(without_progress)} attempts have saved nothing new; the last one: {attempt.error}"


def _was_stopped(code: int, failure: dict[str, Any] | None) -> bool:
    """Whether the attempt ended because of a signal from outside.

    USR2 always comes from there; TERM also from srun, which ends a step with it once a process of it has died.
    """
    signal_name = failure.get("signal") if failure else None
    if code in (0, KILLED_BY_USR2) or signal_name == "SIGUSR2":
        return True
    by_term = signal_name == "SIGTERM" or (failure is None and code in (STOPPED, KILLED_BY_TERM))
    return by_term and slurm.is_preempted(job_id())


def _requeue(files: RunDirectory, record: Record, asks: bool) -> int:
    """Requeues the job, then sets the nodes to avoid, which SLURM changes only while a job waits.

    asks: whether to ask SLURM first which nodes the job can do without; not if it does not answer.
    """
    attempt = record.attempts[-1]
    if not slurm.has("scontrol") and record.requeue_exit is not None:
        say(f"=== exiting with code {record.requeue_exit}, after which SLURM requeues the job")
        return record.requeue_exit
    blamed = try_to("faults.jsonl", lambda: blamed_hosts([files.whole.path])) or []
    if asks:
        avoided, reason = excludable_hosts(record.script, record.exclude, blamed)
    else:
        avoided, reason = record.avoided, "squeue did not answer"
    refused = slurm.requeue(job_id())
    if refused and _state() in ("RUNNING", None):  # not if it has been requeued, and only the answer was lost
        record.error = f"it could not be requeued ({refused}); after: {attempt.error}"
        say(f"=== {record.error}")
        return 1
    if avoided != record.avoided:
        refused = slurm.exclude(job_id(), exclusion(record.exclude, avoided))
        reason = refused or reason
        record.avoided = record.avoided if refused else avoided
    if record.avoided:
        say(f"=== the next attempt avoids {', '.join(record.avoided)}")
    for host in sorted(set(blamed) - set(record.avoided)):
        attempt.error = f"{attempt.error}\n{host} is not avoided: {reason}"
        say(f"=== {host} is not avoided: {reason}")
    return 1


def _state() -> str | None:
    """This job's state, None if squeue does not answer; not RUNNING if it was cancelled, or requeued by others."""
    try:
        job = slurm.queue([job_id()]).get(job_id())
    except ConfigError as error:
        say(f"=== {error}")
        return None
    if job is None:
        return "GONE"
    return "RUNNING" if job.lost_batch_script else job.state


def _try_to_write(files: RunDirectory, record: Record) -> None:
    """Writes the record if the disk takes it; one that was made up for the requeue is not written."""
    if record.folder:
        try_to(files.job.name, lambda: write_record(files, record))


def _failure(files: RunDirectory) -> dict[str, Any] | None:
    """What the first failing process recorded, if it could."""
    try:
        failure: dict[str, Any] = json.loads(files.error.read_text())
    except (OSError, ValueError):  # ValueError: a full disk has cut it off
        return None
    return failure


def _last_fault(files: RunDirectory, since: str) -> str | None:
    """What training itself recorded last in this attempt, such as which host hung."""
    faults = try_to("faults.jsonl", files.whole.read_faults)
    return faults[-1]["message"] if faults and faults[-1]["time"] >= since else None


def _reason(code: int, said: str | None, exit_reason: str) -> str:
    if code == 0:
        return "stopped before a time limit or a preemption, or on request"
    killed = f", signal {code - 128}" if 128 < code < 160 else ""
    why = f"\n{said}" if said else f"; {exit_reason}"
    return f"a process ended with exit code {code}{killed}{why}"


def main(arguments: list[str]) -> int:
    """Handles the start or the end of an attempt; returns the exit code."""
    verb, submission, *rest = arguments
    slurm.pauses = PATIENT
    folders = with_disk(lambda: json.loads((Path(submission) / FOLDERS).read_text()))
    files = RunDirectory(Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]))
    try:
        if verb == "end":
            return end(files, int(rest[0]))
        begin(files)
    except ConfigError as error:
        say(f"error: {error}")
        return REFUSED
    except OSError as error:
        say(f"error: {error.filename or files.path}: {error.strerror}; fix that, then run submit.py again")
        return REFUSED
    except Exception:
        say(traceback.format_exc())
        if verb == "end" and rest[0] == "0" and not files.result.exists():  # what it has trained is saved
            say(f"=== the end of the attempt could not be recorded; requeuing it: {slurm.requeue(job_id()) or 'done'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
