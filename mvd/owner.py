"""owner.json: which attempt writes to a run directory. There is one at a time.

An attempt takes the record when it starts, its processes check it at every save, and it gives the record back at its
end. The operations used are atomic on NFS as well, and need no locks: link() to take the record, link() and rename() to
take it over.

Must not import torch: the launcher takes the record.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mvd.config import ConfigError
from mvd.host import hostname
from mvd.run_directory import RunDirectory

VARIABLE = "MVD_OWNER"  # tells the processes of an attempt which one that is
REPLACING_SECONDS = 60.0  # far longer than it takes to replace a record


@dataclass(frozen=True)
class Owner:
    """An attempt. job: SLURM's job id, or `local-<process id>`. attempt: SLURM's count of restarts, or 0.

    start: how often the job has since started its processes again, in the allocation that it holds. port: where its
    processes find each other; 0 if that is settled otherwise. directory: the job's working directory, which tells it
    from another job that SLURM gave the same id later; None if it has none of its own. together: ids of the stages that
    train in this attempt, separated by commas, if it is of several. uid: of the user whose attempt it is.
    """

    job: str
    attempt: int
    host: str
    started: str
    port: int = 0
    directory: str | None = None
    start: int = 0
    together: str = ""
    uid: int = field(default_factory=os.getuid)

    @property
    def name(self) -> str:
        """What MVD_OWNER holds."""
        return f"{self.job}.{self.attempt}.{self.start}"

    def __str__(self) -> str:
        start = f", start {self.start + 1}" if self.start else ""
        return f"job {self.job}, attempt {self.attempt + 1}{start}, on {self.host} since {self.started}"


class OwnedByAnother(ConfigError):
    """Another attempt writes to the run directory; the sentence says which."""


def read_owner(files: RunDirectory) -> Owner | None:
    """The attempt that writes to a run directory, or None."""
    try:
        return Owner(**json.loads(files.owner.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{files.owner} is damaged; delete it if no job of this stage is running") from error


def take(files: RunDirectory, owner: Owner, is_gone: Callable[[Owner], bool]) -> None:
    """Makes an attempt the owner. is_gone: whether another owner has ended without giving the record back.

    A later attempt of the same job replaces the earlier one, whose processes stop at their next save.

    Raises:
        OwnedByAnother: another attempt is the owner, and not gone.
        OSError: the disk refuses the record.
    """
    files.path.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + REPLACING_SECONDS
    while not _create(files, owner):
        current = read_owner(files)
        if current == owner:
            return
        if current is None:  # given back meanwhile
            continue
        superseded = current.job == owner.job and (current.attempt, current.start) <= (owner.attempt, owner.start)
        if not superseded and not is_gone(current):
            raise OwnedByAnother(
                f"{files.path} belongs to {current}; cancel that first (if it has ended, delete {files.owner})"
            )
        if _replace(files, current, owner):
            return
        if time.monotonic() > give_up:  # whoever wanted to replace the record was killed while it did
            _claim(files, current).unlink(missing_ok=True)
            give_up = time.monotonic() + REPLACING_SECONDS
        time.sleep(0.01)


def give_back(files: RunDirectory, owner: Owner) -> None:
    """Removes the record if it is this attempt's."""
    if read_owner(files) == owner:
        files.owner.unlink(missing_ok=True)


def lost_to(files: RunDirectory) -> str | None:
    """Who owns the run directory instead of this process's attempt, in a sentence; None while it is this attempt.

    A process without MVD_OWNER, such as one started by hand with torchrun, has no record: nobody else may have one.
    """
    own, current = os.environ.get(VARIABLE), read_owner(files)
    if own == (current.name if current is not None else None):
        return None
    if own is None:
        return f"{files.path} belongs to {current}; cancel that first (if it has ended, delete {files.owner})"
    return f"{files.path} no longer belongs to this attempt ({own}), but to {current or 'none'}; stopping"


def _create(files: RunDirectory, owner: Owner) -> bool:
    """Writes the record unless there is one; returns whether it did."""
    with _written(files, owner) as temporary:
        try:
            os.link(temporary, files.owner)
        except FileExistsError:
            return False
    return True


def _replace(files: RunDirectory, stale: Owner, owner: Owner) -> bool:
    """Replaces a stale record by the attempt's own; False if it is being replaced, or has been.

    Only whoever links the record to a name made of its content may replace it, and one process at a time can. There is
    always a record meanwhile, so that nobody creates another one.
    """
    claim = _claim(files, stale)
    try:
        os.link(files.owner, claim)
    except (FileExistsError, FileNotFoundError):
        return False
    try:
        if Owner(**json.loads(claim.read_text())) != stale:
            return False
        with _written(files, owner) as temporary:
            os.replace(temporary, files.owner)
    finally:
        claim.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def _written(files: RunDirectory, owner: Owner) -> Iterator[Path]:
    """A temporary file with the attempt's record."""
    temporary = files.owner.with_name(f".{files.owner.name}.{hostname()}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "x") as handle:
            json.dump(dataclasses.asdict(owner), handle)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _claim(files: RunDirectory, stale: Owner) -> Path:
    content = json.dumps(dataclasses.asdict(stale), sort_keys=True).encode()
    return files.owner.with_name(f".{files.owner.name}.{hashlib.sha256(content).hexdigest()[:16]}")
