"""What SLURM says of jobs: squeue for those that wait or run, sacct for those that have ended."""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mvd.config import ConfigError

SECONDS_TO_ANSWER = 30


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. reason: SLURM's word for why it does not run, such as Resources; elapsed: H:MM:SS."""

    state: str
    reason: str
    elapsed: str

    @property
    def runs(self) -> bool:
        return self.state != "PENDING"


def is_available() -> bool:
    return shutil.which("sbatch") is not None


def queue(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """The queued and running ones among these jobs; `24` stands for every element of an array, `24_3` for one.

    Raises:
        ConfigError: squeue does not answer.
    """
    wanted = {job_id for job_id in job_ids if job_id[:1].isdigit()}
    if not wanted:
        return {}
    roots = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}))
    done = _run("squeue", "--noheader", "--array", "--jobs", roots, "--format", "%i|%T|%r|%M")
    if done.returncode and "Invalid job id" not in done.stderr:  # which it says of a single job that is long over
        raise ConfigError(f"squeue does not answer ({_one_line(done.stderr)}); try again when SLURM is back")
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, elapsed = line.strip().split("|")
        if job_id in wanted or job_id.partition("_")[0] in wanted:
            found[job_id] = QueuedJob(state, reason, elapsed)
    return found


def ended(job_ids: Iterable[str]) -> dict[str, str]:
    """Job id -> state of those that accounting knows, such as CANCELLED; empty where there is no accounting."""
    roots = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    if not roots or shutil.which("sacct") is None:
        return {}
    try:
        done = _run("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", roots, "--format", "jobid,state")
    except ConfigError:
        return {}
    pairs = (line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1)
    return {job_id: state.split()[0] for job_id, state in pairs if state}


def cancel(job_ids: Iterable[str]) -> None:
    """Cancels jobs, queued or running.

    Raises:
        ConfigError: scancel refuses.
    """
    done = _run("scancel", *job_ids)
    if done.returncode:
        raise ConfigError(f"scancel refuses: {_one_line(done.stderr)}")


def requeue(job_id: str) -> str:
    """Puts a running job back into the queue, under its id; returns SLURM's objection, or nothing."""
    return _error_message("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: str) -> str:
    """Changes the nodes that a waiting job excludes; returns SLURM's objection, or nothing."""
    return _error_message("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}")


def exclusion_error(script: Path, nodes: str) -> str:
    """Why a batch script could not run without these nodes, in SLURM's words; empty where it can."""
    return _error_message("sbatch", "--test-only", f"--exclude={nodes}", str(script))


def _error_message(*command: str) -> str:
    try:
        done = _run(*command)
    except ConfigError as error:
        return str(error)
    return (_one_line(done.stderr) or f"exit code {done.returncode}") if done.returncode else ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]} does not answer ({error}); try again when SLURM is back") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
