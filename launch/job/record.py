"""job.json: what was submitted for a stage, and its attempts so far.

It is in the stage's run directory or, if a test is split, in one folder per shard. The launcher writes it when it
submits, launch/job/attempts.py at the start and the end of each attempt; nobody else does.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from launch.slurm.client import slurm
from launch.slurm.jobs import EndedJob, QueuedJob
from mvd.config import ConfigError
from mvd.files import write_json
from mvd.host import hostname
from mvd.run_directory import RunDirectory

ON_REQUEST = "on request"  # how a --local run ended that was stopped with Ctrl-C


@dataclass
class Attempt:
    """One start of a job: when and on which host, how much was saved by then (RunDirectory.progress), how it ended.

    stopped: whether it ended because of a signal from outside, such as SLURM's before a time limit. requeue: SLURM's
    count of the job's restarts. start: how often the job has started its processes again since, in the allocation that
    it holds. shrunk_to: its number of processes, if it had fewer than planned; else 0. at_limit: whether the signal was
    that before its time limit.
    """

    job_id: str
    host: str
    started: str
    saved: int
    ended: str | None = None
    error: str | None = None
    stopped: bool = False
    requeue: int = 0
    start: int = 0
    shrunk_to: int = 0
    at_limit: bool = False

    @property
    def name(self) -> str:
        """The attempt's name in owner.json and provenance.json (mvd.owner)."""
        return f"{self.job_id}.{self.requeue}.{self.start}"


@dataclass
class Record:
    """A submission: its job id, its sbatch folder, the rows it was submitted for, and its attempts so far.

    job_id: SLURM's, or `local-<process id>` of a --local run. parents: ids of the stages it starts from. error: the
    last lines of the final error. exclude: the nodes that the profile excludes, as sbatch takes them. avoided: nodes
    that are excluded too, since faults were blamed on them. directory: the job's working directory, which no other job
    has; None in a record of version 0.1. requeue_exit: an exit code after which the site's SLURM requeues a job.
    spare_nodes: nodes of the job beyond those that its processes use. fewer: smaller numbers of processes with which
    the job may go on if it has too few nodes; none if the profile does not allow it (slurm.shrink).
    warning_seconds: how long before its time limit the job is told to save. together: ids of the other stages of the
    job, with which this one shares its teachers.
    """

    job_id: str
    folder: str
    submitted: str
    nodes: int
    rows: list[str]
    parents: list[str]
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
    exclude: str = ""
    avoided: list[str] = field(default_factory=list)
    directory: str | None = None
    requeue_exit: int | None = None
    spare_nodes: int = 0
    warning_seconds: int = 0
    fewer: list[int] = field(default_factory=list)
    together: list[str] = field(default_factory=list)

    @property
    def is_local(self) -> bool:
        return self.job_id.startswith("local-")

    @property
    def runs_locally(self) -> bool:
        """Whether a --local run is in progress; one on another machine is, as long as it has recorded no end."""
        if not self.is_local or self.attempts[-1].ended:
            return False
        process = self.job_id.partition("-")[2]
        return self.attempts[-1].host != hostname() or Path(f"/proc/{process}").exists()

    @property
    def requeued(self) -> int:
        """How often the job was requeued and started again."""
        return max(0, sum(attempt.start == 0 for attempt in self._of_this_job) - 1)

    @property
    def restarted(self) -> int:
        """How often the job has started its processes again in the allocation that it held."""
        return sum(attempt.start > 0 for attempt in self._of_this_job)

    @property
    def _of_this_job(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.job_id == self.job_id]

    @property
    def outlasts_nodes(self) -> bool:
        """Whether the job keeps its allocation if a node is lost or blamed (sbatch --no-kill)."""
        return self.spare_nodes > 0 or bool(self.fewer)

    @property
    def script(self) -> Path:
        """The batch script."""
        return Path(self.folder) / f"{self.job_id.partition('_')[0]}_submission.sh"

    def log(self, rank: int = 0) -> Path:
        """What a rank printed, all attempts of the job one after the other."""
        return Path(self.folder) / f"{self.job_id}_{rank}_log.out"

    def is_of(self, job: QueuedJob | EndedJob) -> bool:
        """Whether a job under this record's id is the one that was submitted: SLURM may use an id again.

        Accounting knows no directory of a job that was cancelled before it started.
        """
        never_started = isinstance(job, EndedJob) and not job.directory
        return never_started or self.directory in (None, job.directory)


class Member(NamedTuple):
    """A stage of a job."""

    files: RunDirectory
    record: Record


def was_cancelled(files: RunDirectory, folder: str) -> bool:
    """Whether launch/cancel.py has taken a stage out of a job that goes on. folder: of the job's submission."""
    try:
        return files.cancelled.read_text(encoding="utf-8") == folder
    except FileNotFoundError:
        return False


def has_left(files: RunDirectory, record: Record) -> bool:
    """Whether a stage that shared its job with others is complete, has failed or was cancelled; the job may go on."""
    is_over = record.error is not None or files.result.exists() or was_cancelled(files, record.folder)
    return bool(record.together) and is_over


def jobs_in_queue(records: Iterable[Record]) -> dict[str, QueuedJob]:
    """Job id -> job, for the records' jobs that are in the queue.

    Raises:
        ConfigError: squeue does not answer.
    """
    by_id = {record.job_id: record for record in records}
    return {job: entry for job, entry in slurm.queue(by_id).items() if job in by_id and by_id[job].is_of(entry)}


def active_jobs(runs: Path) -> dict[str, list[Record]]:
    """Stage id -> records of its queued or running jobs, for the whole runs folder.

    Raises:
        ConfigError: squeue does not answer.
    """
    found: dict[str, list[Record]] = {}
    for stage, files, record in all_records(runs):
        if not record.is_local and not has_left(files, record):
            found.setdefault(stage, []).append(record)
    queued = jobs_in_queue(record for records in found.values() for record in records)
    alive = {stage: [record for record in records if record.job_id in queued] for stage, records in found.items()}
    return {stage: records for stage, records in alive.items() if records}


def all_records(runs: Path) -> Iterator[tuple[str, RunDirectory, Record]]:
    """Stage id, folder and record of each submission in a runs folder; one for each shard of a split test."""
    for path in (*runs.glob("*/job.json"), *sorted(runs.glob("*/shards/*/job.json"))):
        files = RunDirectory(path.parent)
        if record := read_record(files):
            yield path.relative_to(runs).parts[0], files, record


def refuse_active(files: RunDirectory) -> None:
    """Raises ConfigError if a stage is queued or running, with or without SLURM."""
    found = [(part, record) for part in files.job_files() if (record := read_record(part))]
    records = [record for part, record in found if not has_left(part, record)]
    queued = jobs_in_queue(records) if slurm.is_available() else {}
    if active := [record.job_id for record in records if record.runs_locally or record.job_id in queued]:
        jobs = ", ".join(active)
        raise ConfigError(f"{files.path.name} is queued or running already, as job {jobs}; cancel that first")


def option_of(records: Iterable[Record | None]) -> list[str]:
    """submit.py's option with which stages run again as they did: `--local` if all did so."""
    known = [record for record in records if record is not None]
    return ["--local"] if known and all(record.is_local for record in known) else []


def jobs_in_history(records: Iterable[Record]) -> dict[str, EndedJob]:
    """Job id -> job, for the records' jobs that accounting knows."""
    by_id = {record.job_id: record for record in records}
    return {job: entry for job, entry in slurm.history(by_id).items() if job in by_id and by_id[job].is_of(entry)}


def read_record(files: RunDirectory) -> Record | None:
    """The record in a stage's or shard's folder, or None if it was never submitted.

    Raises:
        ConfigError: the file is damaged.
    """
    path = files.job
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        attempts = [Attempt(**attempt) for attempt in content.pop("attempts")]
        return Record(**content, attempts=attempts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged; delete it once no job of that stage is in the queue") from error


def write_record(files: RunDirectory, record: Record) -> None:
    """Writes job.json; raises OSError if the disk refuses it."""
    files.path.mkdir(parents=True, exist_ok=True)
    write_json(files.job, dataclasses.asdict(record))


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def locked(runs: Path) -> Iterator[None]:
    """Lets one submission at a time into a runs folder, so that two of them cannot submit the same stage.

    Raises:
        ConfigError: the folder cannot be written, or its file system has no locks.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        handle = open(runs / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"runs: {runs} cannot be written ({reason}); use another folder in the profile") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"runs: {runs} is on a file system without locks; use another folder") from error
        yield
