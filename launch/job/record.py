"""job.json: what was submitted for a stage, and what became of its attempts.

It lies in the stage's run directory, or, where a test is split, in one folder a shard. The launcher writes it when it
submits, launch/job/attempts.py at the start and the end of each attempt; nobody else does.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mvd.config import ConfigError
from mvd.files import write_json
from mvd.host import hostname
from mvd.run_directory import RunDirectory


@dataclass
class Attempt:
    """One start of a job: when and where, what was saved by then (see launch.job.attempts), and how it ended."""

    job_id: str
    host: str
    started: str
    saved: int
    ended: str | None = None
    error: str | None = None


@dataclass
class Record:
    """A submission: its job id, its sbatch folder, the rows it was submitted for, and its attempts so far.

    job_id: SLURM's, or `local-<process id>` of a --local run. parents: ids of the stages it starts from. error: the
    last lines of what ended it for good. exclude: the nodes that the profile excludes, in sbatch's words. avoided:
    those that are excluded as well, since faults have named them.
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

    @property
    def is_local(self) -> bool:
        return self.job_id.startswith("local-")

    @property
    def runs_locally(self) -> bool:
        """Whether a --local run goes on; one on another machine is believed until it says that it has ended."""
        if not self.is_local or self.attempts[-1].ended:
            return False
        process = self.job_id.partition("-")[2]
        return self.attempts[-1].host != hostname() or Path(f"/proc/{process}").exists()

    @property
    def requeued(self) -> int:
        """How often the job was started again."""
        return max(0, sum(attempt.job_id == self.job_id for attempt in self.attempts) - 1)

    @property
    def script(self) -> Path:
        """What sbatch was given."""
        return Path(self.folder) / f"{self.job_id.partition('_')[0]}_submission.sh"

    def log(self, rank: int = 0) -> Path:
        """What a rank printed, all attempts of the job one after the other."""
        return Path(self.folder) / f"{self.job_id}_{rank}_log.out"


def read_record(files: RunDirectory) -> Record | None:
    """The record in a stage's or shard's folder, or None where it was never submitted.

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
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged; delete it once no job of that stage is in the queue") from error


def write_record(files: RunDirectory, record: Record) -> None:
    files.path.mkdir(parents=True, exist_ok=True)
    write_json(files.job, dataclasses.asdict(record))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def locked(runs: Path) -> Iterator[None]:
    """Lets one submission at a time into a runs folder, so that two of them cannot submit the same stage.

    Raises:
        ConfigError: the folder cannot be written, or does not know locks.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        handle = open(runs / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"runs: {runs} cannot be written ({reason}); name another folder in the profile") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(f"runs: {runs} is on a disk without file locks; name another folder") from error
        yield
