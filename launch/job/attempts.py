"""Run by a job's batch script before and after its processes: records each attempt, and decides what follows it.

    python -m launch.job.attempts begin|end <folder of the submission> [exit code of srun]

An attempt whose process died is followed by another one in the allocation that the job holds: `begin` prints srun's
options for it, `end` prints a word if it is to follow. If that is not possible (launch.job.restart), and if it was told
to stop, the job goes back into the queue under its id, as many times as needed, and avoids the hosts that its faults
were blamed on. After MAX_FAILED_ATTEMPTS attempts without a new checkpoint the job is given up and its error written to
job.json; attempts that were told to stop do not count, unless at their time limit.

SLURM and the disk may fail for some minutes without ending the job: questions are repeated, the start waits for the
disk, and the requeue at the end does not depend on it.
"""

import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launch.job.disk import try_to, with_disk
from launch.job.log import say
from launch.job.ownership import is_gone
from launch.job.record import Attempt, Member, Record, has_left, now, read_record, was_cancelled, write_record
from launch.job.rendezvous import free_port
from launch.job.requeue import requeue
from launch.job.restart import blamed_since, place_for, reason_to_requeue, srun_options
from launch.job.students import (
    all_is_well,
    folders_of,
    is_over,
    not_cancelled,
    own_members,
    owner_of,
    settle_children,
    to_train,
)
from launch.job.this_job import is_this_attempt, job_id, queue_state, restarts, start
from launch.job.verdict import judge, judge_time_limit, without_progress
from launch.slurm.client import PATIENT, slurm
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.owner import Owner, give_back, take
from mvd.run_directory import RunDirectory

REFUSED = 3  # exit code of a start that another one would not improve; Python's own after a crash is 1
SECONDS_AGAIN = 30.0  # before the last attempt that may save nothing new
SECONDS_FOR_RECORD = 600.0  # the launcher writes job.json when sbatch has answered


def begin(folders: Sequence[RunDirectory], submission: Path) -> list[str]:
    """Makes this attempt the owner of its run directories and records it; returns srun's options for its processes.

    Raises:
        ConfigError: job.json is not of this job, another attempt owns a directory, or the job could not be requeued.
    """
    members = _members(folders, submission)
    _check_requeue(members[0].record)
    place = place_for(folders, members[0].record, start())  # the faults of complete students count too
    together = ",".join(files.path.name for files, _ in members) if len(folders) > 1 else ""
    directory = members[0].record.directory
    owner = Owner(job_id(), restarts(), hostname(), now(), free_port(), directory, start(), together)
    for member in members:
        _start_stage(member, owner, place.shrunk_to if place else 0)
        if was_cancelled(member.files, member.record.folder):
            give_back(member.files, owner)
    if len(folders) > 1:
        settle_children(folders)
    return srun_options(place, start())


def _start_stage(member: Member, owner: Owner, shrunk_to: int) -> None:
    files, record = member
    with_disk(lambda: take(files, owner, is_gone))
    if was_cancelled(files, record.folder):  # meanwhile, and its record may be that of another job
        give_back(files, owner)
        return
    with_disk(lambda: files.error.unlink(missing_ok=True))
    record.error = None  # of an attempt after which somebody else requeued the job
    saved = files.progress()
    attempt = Attempt(job_id(), owner.host, owner.started, saved, requeue=restarts(), start=start())
    attempt.shrunk_to = shrunk_to
    record.attempts.append(attempt)
    with_disk(lambda: write_record(files, record))


def _members(folders: Sequence[RunDirectory], submission: Path) -> list[Member]:
    """The stages to train, with their records, which are there once the launcher has written them."""
    if len(folders) == 1:
        return [Member(folders[0], _wait_for_record(folders[0]))]
    left = not_cancelled(folders, submission)
    if restarts() == start() == 0:
        for files in left:
            _wait_for_record(files)
    members = own_members(left, job_id())
    if not members:
        raise ConfigError(f"all stages of job {job_id()} were cancelled, or submitted again; it ends")
    return to_train(members)


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


def end(folders: Sequence[RunDirectory], code: int, reason: str = "") -> int:
    """Records how the attempt ended, and starts another one unless its stages are complete or have failed.

    reason: why it ended, if the exit code does not say that. Returns the exit code of the job, which decides whether
    its children start.
    """
    is_group = len(folders) > 1
    members = [Member(files, _own_record(files)) for files in folders if _is_mine(files, is_group)]
    if not members and not is_group:
        return 1
    for _, record in members:
        record.attempts[-1].ended = now()
    left = [member for member in members if not is_over(member, code, is_group)]
    if left:
        judge(left, code)
        left[0].record.attempts[-1].error = reason or left[0].record.attempts[-1].error
        _agree(left)
    _try_to_write(members)  # now, since SLURM gives a requeued job a few seconds only
    if left:
        say(f"=== {left[0].record.error or left[0].record.attempts[-1].error}")
    _give_back([member for member in members if member not in left])
    if left and left[0].record.error is None:
        return _go_on(left, folders)
    return _finish(left, folders)


def _finish(left: Sequence[Member], folders: Sequence[RunDirectory]) -> int:
    """Ends the job, whose stages are complete but for those left, which have failed; returns its exit code."""
    _give_back(left)
    if len(folders) == 1:
        return 1 if left else 0
    return _end_of_group(folders)


def _end_of_group(folders: Sequence[RunDirectory]) -> int:
    """Settles the children; returns the exit code of the job, at which those start or are cancelled that still wait.

    If SLURM has not let the children of a complete student go, all start: one whose parent failed ends by itself.
    """
    settled = settle_children(folders)
    is_well = try_to("job.json", partial(all_is_well, folders, job_id()))
    return 0 if is_well or (not settled and any(files.result.exists() for files in folders)) else 1


def _agree(members: Sequence[Member]) -> None:
    """Notes for all stages what was found out for the first one."""
    (_, first), *others = members
    for _, record in others:
        record.error, record.avoided = first.error, first.avoided
        record.attempts[-1].error, record.attempts[-1].stopped = first.attempts[-1].error, first.attempts[-1].stopped


def _go_on(members: Sequence[Member], folders: Sequence[RunDirectory]) -> int:
    """Has the batch script start the processes again, or requeues the job; returns the exit code of the job.

    members: the stages that are to go on. folders: of all stages of the job, whose faults count too.
    """
    record = members[0].record
    attempt = record.attempts[-1]
    if not attempt.stopped and without_progress(members) > 1 and not blamed_since(folders, attempt.started):
        time.sleep(SECONDS_AGAIN)  # what two attempts have met may pass
    state, job = queue_state()
    if state == "RUNNING" and job is not None and not attempt.stopped:
        why = reason_to_requeue(folders, members, job)
        if why is None:
            say("=== its processes start again in this allocation")
            print("again", flush=True)  # for the batch script
            return 0
        say(f"=== the job is requeued, since {why}")
    if job is not None and attempt.stopped:
        judge_time_limit(members, job.seconds_left)
        _agree(members)
        _try_to_write(members)
        if record.error is not None:
            say(f"=== {record.error}")
            return _finish(members, folders)
    _give_back(members)
    if state not in ("RUNNING", None):
        return 1
    result = requeue(folders, record, asks=state is not None)
    _agree(members)
    _try_to_write(members)
    return _end_of_group(folders) if record.error is not None and len(folders) > 1 else result


def _give_back(members: Sequence[Member]) -> None:
    for files, _ in members:
        owner = owner_of(files)
        if owner is not None and is_this_attempt(owner):
            try_to("owner.json", partial(give_back, files, owner))


def end_without_batch_script(folders: Sequence[RunDirectory]) -> None:
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
        end(folders, 0, f"SLURM ended the job ({job.reason}) before its batch script could requeue it")


def _is_mine(files: RunDirectory, is_group: bool) -> bool:
    """Whether a stage is in this attempt, as far as the disk tells."""
    owner = owner_of(files)
    if owner is not None and not is_this_attempt(owner):
        say(f"=== {files.path} belongs to {owner}; this attempt leaves it alone")
        return False
    return owner is not None or not is_group or not try_to(files.job.name, partial(_is_left_out, files))


def _is_left_out(files: RunDirectory) -> bool:
    """Whether a stage of a group has left the job, or was submitted again."""
    record = read_record(files)
    return record is None or record.job_id != job_id() or has_left(files, record)


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


def _try_to_write(members: Sequence[Member]) -> None:
    """Writes the records if the disk takes them; one that was made up for the requeue is not written."""
    for files, record in members:
        if record.folder:
            try_to(files.job.name, partial(_write_own, files, record))


def _write_own(files: RunDirectory, record: Record) -> None:
    """Writes a record, unless the stage was submitted again since it was read, after it had been cancelled."""
    current = read_record(files)
    if current is not None and current.job_id == record.job_id:
        write_record(files, record)


def main(arguments: list[str]) -> int:
    """Handles the start or the end of an attempt; returns the exit code."""
    verb, folder, *rest = arguments
    slurm.pauses = PATIENT
    submission = Path(folder)
    folders = folders_of(submission)
    try:
        if verb == "end":
            return end(folders, int(rest[0]))
        print(*begin(folders, submission), flush=True)
    except ConfigError as error:
        say(f"error: {error}")
        return REFUSED
    except OSError as error:
        say(f"error: {error.filename or submission}: {error.strerror}; fix that, then run submit.py again")
        return REFUSED
    except Exception:
        say(traceback.format_exc())
        if verb == "end" and rest[0] == "0" and not all(files.result.exists() for files in folders):  # trained: saved
            say(f"=== the end of the attempt could not be recorded; requeuing it: {slurm.requeue(job_id()) or 'done'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
