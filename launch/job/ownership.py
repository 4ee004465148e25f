"""Whether the owner of a run directory has ended without giving its record back."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from launch.slurm.client import slurm
from launch.slurm.jobs import QueuedJob
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.owner import Owner

UNFINISHED = {"PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "RESIZING"}
POLL_SECONDS = 5.0
SECONDS_FOR_CLEANUP = 900.0  # of a job that is COMPLETING, which may take its time to kill its processes


def is_gone(owner: Owner, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether an attempt is over; waits for one that SLURM is cleaning up after.

    A --local run on another machine cannot be seen from here, and so is not gone; neither is another user's job on a
    site that hides it.

    Raises:
        ConfigError: SLURM does not answer.
    """
    local, _, process = owner.job.partition("local-")
    if process and not local:
        return owner.host == hostname() and not Path(f"/proc/{process}").exists()
    if not slurm.is_available():
        return False
    waited = 0.0
    while (job := _queued(owner)) is not None and job.is_completing and waited < SECONDS_FOR_CLEANUP:
        sleep(POLL_SECONDS)
        waited += POLL_SECONDS
    return job is None and not _may_be_hidden(owner)


def _queued(owner: Owner) -> QueuedJob | None:
    """The owner's job in the queue; if squeue does not answer, accounting has to know that it has ended."""
    try:
        job = slurm.queue([owner.job]).get(owner.job)
    except ConfigError:
        ended = slurm.history([owner.job]).get(owner.job)
        if ended is None or ended.state in UNFINISHED:
            raise
        return None
    return job if job is not None and owner.directory in (None, job.directory) else None


def _may_be_hidden(owner: Owner) -> bool:
    """Whether a job that is not in the queue may be another user's that squeue does not show (PrivateData)."""
    config = slurm.config()
    if os.getuid() in (0, owner.uid) or (config and "jobs" not in config.get("PrivateData", "")):
        return False
    ended = slurm.history([owner.job]).get(owner.job)
    return ended is None or ended.state in UNFINISHED
