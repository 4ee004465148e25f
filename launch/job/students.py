"""The stages of a job. There is one, or several students that share one pass of their teachers (mvd.train.group).

Each has its own run directory, owner, attempts and result. A student leaves the job when it is complete, has failed for
good or was cancelled; the others go on, and the next start of the job leaves it out.

The jobs of its children were submitted to start after the whole job. They need not wait for the other students: as soon
as theirs is complete, SLURM is told to let them start, and if it has failed, they are cancelled. If SLURM does not
answer, that is repeated at every start of the job and at its end.
"""

import json
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from launch.job.disk import try_to, with_disk
from launch.job.log import say
from launch.job.record import Member, has_left, jobs_in_queue, now, read_record, was_cancelled, write_record
from launch.slurm.client import PATIENT, slurm
from mvd.config import ConfigError
from mvd.owner import VARIABLE, Owner, give_back, read_owner
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

FOLDERS = "folders.json"  # of the submission: the records' folders of each element of the array


def folders_of(submission: Path) -> list[RunDirectory]:
    """The folders of the records of this job's stages."""
    elements = with_disk(lambda: json.loads((submission / FOLDERS).read_text()))
    return [RunDirectory(Path(folder)) for folder in elements[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]]


def not_cancelled(folders: Sequence[RunDirectory], submission: Path) -> list[RunDirectory]:
    """The stages that launch/cancel.py has not taken out of the job."""
    return [files for files in folders if not with_disk(partial(was_cancelled, files, str(submission)))]


def own_members(folders: Sequence[RunDirectory], job: str) -> list[Member]:
    """The stages whose record is this job's: one that has left it may have been submitted again."""
    found = []
    for files in folders:
        record = with_disk(partial(read_record, files))
        if record is not None and record.job_id == job:
            found.append(Member(files, record))
    return found


def to_train(members: Sequence[Member]) -> list[Member]:
    """The stages that a start of their job trains: those not complete, without those that have failed.

    If all of these have failed, somebody has requeued the job, and they are tried again.
    """
    incomplete = [member for member in members if not member.files.result.exists()]
    return [member for member in incomplete if member.record.error is None] or incomplete or list(members)


def all_is_well(folders: Sequence[RunDirectory], job: str) -> bool:
    """Whether no stage has failed in this job: each is complete, or was cancelled or submitted again."""
    for files in folders:
        record = read_record(files)
        is_here = record is not None and record.job_id == job and not was_cancelled(files, record.folder)
        if is_here and not files.result.exists():
            return False
    return True


def settle_children(folders: Sequence[RunDirectory]) -> bool:
    """Lets the jobs start that wait for a complete student; cancels those that wait for one that has failed.

    Returns whether that was possible.
    """
    return bool(try_to("the jobs of the next stages", partial(_settle, folders)))


def _settle(folders: Sequence[RunDirectory]) -> bool:
    complete = {files.path.name for files in folders if files.result.exists()}
    failed = {files.path.name for files in folders if (record := read_record(files)) and record.error} - complete
    runs = folders[0].path.parent
    paths = runs.glob("*/job.json") if complete | failed else ()
    records = [try_to(str(path), partial(read_record, RunDirectory(path.parent))) for path in paths]
    jobs = [child for child in records if child is not None and (complete | failed) & set(child.parents)]
    waiting = {job for job, entry in jobs_in_queue(jobs).items() if entry.state == "PENDING"}
    jobs = [child for child in jobs if child.job_id in waiting]
    if lost := [child.job_id for child in jobs if failed & set(child.parents)]:
        slurm.cancel(lost)
        say(f"=== cancelled, since the stage they wait for has failed: {', '.join(lost)}")
    all_done = True
    for child in jobs:
        if all(RunDirectory(runs / p).result.exists() for p in child.parents):
            refused = slurm.start_now(child.job_id)
            all_done &= not refused
            say(f"=== job {child.job_id} need not wait any longer{refused and ': '}{refused}")
    return all_done


def leave_group(stage: Stage, error: str | None) -> None:
    """Called by the first process when a student is complete, or cannot continue (error), while others may go on.

    In a thread, since disk and SLURM may take minutes to answer.
    """
    threading.Thread(target=_leave, args=(stage.files, error), daemon=True).start()


def _leave(files: RunDirectory, error: str | None) -> None:
    slurm.pauses = PATIENT
    say(f"=== {files.path.name} {'is complete' if error is None else 'leaves its job'}")
    try_to(files.job.name, partial(_note_end, files, error))
    settle_children([files])


def _note_end(files: RunDirectory, error: str | None) -> None:
    """Records the end of a student's attempt, and gives its run directory back; not if that is another's by now."""
    owner, record = read_owner(files), read_record(files)
    if owner is None or owner.name != os.environ[VARIABLE]:
        return
    if record is not None and record.job_id == owner.job and not was_cancelled(files, record.folder):
        record.attempts[-1].ended, record.attempts[-1].error = now(), error
        record.error = error
        write_record(files, record)
    give_back(files, owner)


def owner_of(files: RunDirectory) -> Owner | None:
    """The owner of a run directory; None if it has none, or the disk does not say."""
    try:
        return read_owner(files)
    except (ConfigError, OSError) as error:
        say(f"=== {error}")
        return None


def is_over(member: Member, code: int, is_group: bool) -> bool:
    """Whether a stage is complete, or has left its group."""
    files, record = member
    is_complete = (code == 0 or is_group) and bool(try_to(files.result.name, files.result.exists))
    return is_complete or bool(try_to(files.cancelled.name, partial(has_left, files, record)))
