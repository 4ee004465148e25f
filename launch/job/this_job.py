"""The job that this process is in, as SLURM's variables and its queue have it."""

import os

from launch.job.log import say
from launch.slurm.client import slurm
from launch.slurm.jobs import QueuedJob
from mvd.config import ConfigError
from mvd.owner import Owner


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


def is_this_attempt(owner: Owner) -> bool:
    """Whether an owner is the attempt that this process is in."""
    return (owner.job, owner.attempt, owner.start) == (job_id(), restarts(), start())


def queue_state() -> tuple[str | None, QueuedJob | None]:
    """This job's state, None if squeue does not answer; not RUNNING if it was cancelled, or requeued by others."""
    try:
        job = slurm.queue([job_id()]).get(job_id())
    except ConfigError as error:
        say(f"=== {error}")
        return None, None
    if job is None:
        return "GONE", None
    return ("RUNNING", None) if job.lost_batch_script else (job.state, job)
