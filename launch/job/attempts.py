"""Run by a job's batch script before and after its processes: records each attempt, and decides what follows it.

    python -m launch.job.attempts begin|end <folder of the submission> [exit code of srun]

An attempt whose process died is followed by another one in the allocation that the job holds: `begin` prints srun's
options for it, `end` prints a word if it is to follow. If that is not possible (launch.job.restart), and if it was told
to stop, the job goes back into the queue under its id, as many times as needed, and avoids the hosts that its faults
were blamed on. After MAX_FAILED_ATTEMPTS attempts without a new checkpoint the job is given up and its error written to
job.json; attempts that were told to stop do not count.

SLURM and the disk may fail for some minutes without ending the job: questions are repeated, the start waits for the
disk, and the requeue at the end does not depend on it.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from launch.job.disk import try_to, with_disk
from launch.job.log import say
from launch.job.ownership import is_gone
from launch.job.record import Attempt, Record, now, read_record, write_record
from launch.job.rendezvous import free_port
from launch.job.restart import blamed_since, place_for, reason_to_requeue, srun_options
from launch.job.verdict import judge, without_progress
from launch.slurm.client import PATIENT, slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from launch.slurm.jobs import QueuedJob
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.owner import Owner, give_back, read_owner, take
from mvd.run_directory import RunDirectory

FOLDERS = "folders.json"  # of the submission: the record's folder of each element of the array
REFUSED = 3  # exit code of a start that another one would not improve; Python's own after a crash is 1
SECONDS_AGAIN = 30.0  # before the last attempt that may save nothing new
SECONDS_FOR_RECORD = 600.0  # the launcher writes job.json when sbatch has answered


def job_id() -> str:
    """This job's id as SLURM shows it: `24`, or `24_3` in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def start() -> int:
    """How often this job has started its processes again in the allocation that it holds."""
    return int(os.environ.get("MVD_START", "0"))


def begin(files: RunDirectory) -> list[str]:
    """Makes this attempt the owner of the run directory and records it; returns srun's options for its processes.

    Raises:
        ConfigError: job.json is not of this job, another attempt owns the directory, or the job could not be requeued.
    """
    record = _wait_for_record(files)
    _check_requeue(record)
    place = place_for(files, record, start())
    owner = Owner(job_id(), restarts(), hostname(), now(), free_port(), record.directory, start())
    with_disk(lambda: take(files, owner, is_gone))
    with_disk(lambda: files.error.unlink(missing_ok=True))
    record.error = None  # of an attempt after which somebody else requeued the job
    attempt = Attempt(job_id(), owner.host, owner.started, files.progress(), requeue=restarts(), start=start())
    attempt.shrunk_to = place.shrunk_to if place else 0
    record.attempts.append(attempt)
    with_disk(lambda: write_record(files, record))
    return srun_options(place, start())


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
    """Records how the attempt ended, and starts another one unless the stage is complete or has failed.

    reason: why it ended, if the exit code does not say that. Returns the exit code of the job, which decides whether
    its children start.
    """
    owner = _owner(files)
    if owner is not None and (owner.job, owner.attempt, owner.start) != (job_id(), restarts(), start()):
        say(f"=== {files.path} belongs to {owner}; this attempt leaves it alone")
        return 1
    record = _own_record(files)
    attempt = record.attempts[-1]
    attempt.ended = now()
    complete = code == 0 and bool(try_to(files.result.name, files.result.exists))
    if not complete:
        judge(files, code, record)
        attempt.error = reason or attempt.error
    _try_to_write(files, record)  # now, since SLURM gives a requeued job a few seconds only
    if not complete:
        say(f"=== {record.error or attempt.error}")
    if complete or record.error is not None:
        _give_back(files, owner)
        return 0 if complete else 1
    return _go_on(files, record, owner)


def _go_on(files: RunDirectory, record: Record, owner: Owner | None) -> int:
    """Has the batch script start the processes again, or requeues the job; returns the exit code of the job."""
    attempt = record.attempts[-1]
    if not attempt.stopped and without_progress(files, record) > 1 and not blamed_since(files, attempt.started):
        time.sleep(SECONDS_AGAIN)  # what two attempts have met may pass
    state, job = _state()
    if state == "RUNNING" and job is not None and not attempt.stopped:
        why = reason_to_requeue(files, record, job)
        if why is None:
            say("=== its processes start again in this allocation")
            print("again", flush=True)  # for the batch script
            return 0
        say(f"=== the job is requeued, since {why}")
    _give_back(files, owner)
    if state not in ("RUNNING", None):
        return 1
    result = _requeue(files, record, asks=state is not None)
    _try_to_write(files, record)
    return result


def _give_back(files: RunDirectory, owner: Owner | None) -> None:
    try_to("owner.json", lambda: give_back(files, owner) if owner else None)


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
    if refused and _state()[0] in ("RUNNING", None):  # not if it has been requeued, and only the answer was lost
        record.error = f"it could not be requeued ({refused}); after: {attempt.error}"
        say(f"=== {record.error}")
        return 1
    if record.outlasts_nodes and (refused := slurm.resize(job_id(), record.nodes + record.spare_nodes)):
        say(f"=== it asks for the nodes that are left: {refused}")
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


def _state() -> tuple[str | None, QueuedJob | None]:
    """This job's state, None if squeue does not answer; not RUNNING if it was cancelled, or requeued by others."""
    try:
        job = slurm.queue([job_id()]).get(job_id())
    except ConfigError as error:
        say(f"=== {error}")
        return None, None
    if job is None:
        return "GONE", None
    return ("RUNNING", None) if job.lost_batch_script else (job.state, job)


def _try_to_write(files: RunDirectory, record: Record) -> None:
    """Writes the record if the disk takes it; one that was made up for the requeue is not written."""
    if record.folder:
        try_to(files.job.name, lambda: write_record(files, record))


def files_of(submission: Path) -> RunDirectory:
    """The folder of this job's record."""
    folders = with_disk(lambda: json.loads((submission / FOLDERS).read_text()))
    return RunDirectory(Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]))


def main(arguments: list[str]) -> int:
    """Handles the start or the end of an attempt; returns the exit code."""
    verb, submission, *rest = arguments
    slurm.pauses = PATIENT
    files = files_of(Path(submission))
    try:
        if verb == "end":
            return end(files, int(rest[0]))
        print(*begin(files), flush=True)
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
