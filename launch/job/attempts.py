"""Run by a job's batch script before and after its processes: notes each attempt, and decides what follows it.

    python -m launch.job.attempts begin|end <folder of the submission> [exit code of srun]

A job that was told to stop, and one whose process died, goes back into the queue under its id, as often as it takes,
and avoids the machines that its faults have named. Three attempts that end with nothing more saved than before end the
job: its error is then in job.json.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from launch.job.record import Attempt, Record, now, read_record, write_record
from launch.job.verdict import blame_dead_tasks, explain_exit, step_state
from launch.slurm import client as slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.run_directory import RunDirectory

FOLDERS = "folders.json"  # of the submission: the record's folder of each element of the array
ATTEMPTS = 3
LINES = 5
SECONDS_FOR_RECORD = 60


def job_id() -> str:
    """This job's id as SLURM shows it: `24`, or `24_3` in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def begin(files: RunDirectory) -> None:
    """Notes that an attempt begins; waits for the launcher, which writes job.json once it knows the job's id."""
    deadline = time.monotonic() + SECONDS_FOR_RECORD
    while (record := read_record(files)) is None or record.job_id != job_id():
        if time.monotonic() > deadline:
            raise ConfigError(f"{files.job} does not name job {job_id()}; run submit.py again")
        time.sleep(0.2)
    files.error.unlink(missing_ok=True)
    record.attempts.append(Attempt(job_id(), hostname(), now(), files.progress()))
    write_record(files, record)


def end(files: RunDirectory, code: int) -> int:
    """Notes how the attempt ended; returns the exit code of the job, which decides whether its children start."""
    record = read_record(files)
    if record is None:
        raise ConfigError(f"{files.path} has lost its {files.job.name}; run submit.py again")
    attempt = record.attempts[-1]
    attempt.ended = now()
    if code == 0 and files.result.exists():
        write_record(files, record)
        return 0
    failure = _failure(files)
    crash = blame_dead_tasks(files.whole, record.log)  # the others' errors only follow from it
    said = crash or (failure["lines"] if failure else _last_fault(files, attempt.started))
    attempt.error = _reason(code, said, explain_exit(code, step_state(record.log())))
    without_progress = [a for a in record.attempts if a.ended and a.saved == files.progress()]
    if failure and failure["final"]:
        record.error = attempt.error
    elif len(without_progress) >= ATTEMPTS:
        record.error = f"{len(without_progress)} attempts have saved nothing new; the last one: {attempt.error}"
    write_record(files, record)  # now, since SLURM gives a requeued job a few seconds only
    print(f"=== {record.error or attempt.error}", flush=True)
    if record.error is None and _still_wanted():
        _requeue(files, record)
        write_record(files, record)
    return 1


def _requeue(files: RunDirectory, record: Record) -> None:
    """Requeues the job, then tells SLURM which nodes it is to avoid, which can be changed only while it waits."""
    attempt = record.attempts[-1]
    named = blamed_hosts([files.whole.path])
    avoided, objection = excludable_hosts(record.script, record.exclude, named)
    refused = slurm.requeue(job_id())
    if refused:
        record.error = f"it could not be requeued ({refused}); after: {attempt.error}"
        return
    if avoided != record.avoided:
        refused = slurm.exclude(job_id(), exclusion(record.exclude, avoided))
        objection = refused or objection
        record.avoided = record.avoided if refused else avoided
    if record.avoided:
        print(f"=== the next attempt avoids {', '.join(record.avoided)}", flush=True)
    for host in sorted(set(named) - set(record.avoided)):
        attempt.error = f"{attempt.error}\n{host} is not avoided: {objection}"
        print(f"=== {host} is not avoided: {objection}", flush=True)


def _failure(files: RunDirectory) -> dict[str, Any] | None:
    """What the first failing process has noted, if it could."""
    try:
        return json.loads(files.error.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: a full disk has cut it off
        return None


def _still_wanted() -> bool:
    """Whether the job runs, rather than being cancelled or requeued by somebody else at this moment."""
    found = slurm.queue([job_id()]).get(job_id())
    return found is not None and found.state == "RUNNING"


def _last_fault(files: RunDirectory, since: str) -> str | None:
    """What training itself noted last in this attempt, such as which machine hung."""
    faults = files.whole.read_faults()
    return faults[-1]["message"] if faults and faults[-1]["time"] >= since else None


def _reason(code: int, said: str | None, exit_reason: str) -> str:
    if code == 0:
        return "stopped before a time limit or a preemption, or on request"
    killed = f", signal {code - 128}" if 128 < code < 160 else ""
    why = f"\n{said}" if said else f"; {exit_reason}"
    return f"a process ended with exit code {code}{killed}{why}"


def main(arguments: list[str]) -> int:
    verb, submission, *rest = arguments
    folders = json.loads((Path(submission) / FOLDERS).read_text())
    files = RunDirectory(Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]))
    try:
        if verb == "end":
            return end(files, int(rest[0]))
        begin(files)
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or files.path}: {error.strerror}; mend that, then run submit.py again", flush=True
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
