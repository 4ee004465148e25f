"""Jobs as squeue and sacct show them."""

import math
import re
from dataclasses import dataclass

ENDED_BY_SLURM = ("JobLaunchFailure", "RaisedSignal", "NonZeroExitCode", "OutOfMemory", "TimeLimit")  # reasons
TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")  # [[D-]HH:]MM:SS


@dataclass(frozen=True)
class QueuedJob:
    """A job that is in the queue.

    reason: SLURM's word for why it does not run, such as Resources. elapsed: H:MM:SS. left: until its time limit,
    D-HH:MM:SS, or a word. nodes: those of a running job, such as node[1-3]. directory: its working directory.
    """

    state: str
    reason: str
    elapsed: str
    left: str = ""
    nodes: str = ""
    directory: str = ""

    @property
    def seconds_left(self) -> float:
        """Until its time limit; infinite if it has none or SLURM does not say."""
        found = TIME_LEFT.fullmatch(self.left)
        if found is None:
            return math.inf
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def runs(self) -> bool:
        return self.state != "PENDING" and not self.is_completing

    @property
    def is_completing(self) -> bool:
        """True while SLURM cleans up after the job: it has ended, or is about to be requeued."""
        return self.state == "COMPLETING"

    @property
    def lost_batch_script(self) -> bool:
        """True if SLURM ends the job because its batch script has died, or for its time limit.

        The reason is JobLaunchFailure in SLURM 22.05 and RaisedSignal:9(Killed) in 24.11. It is None if the job was
        cancelled, and Cleaning, BeginTime or JobHeldUser if it was requeued already and waits for its cleanup.
        """
        return self.is_completing and self.reason.startswith(ENDED_BY_SLURM)


@dataclass(frozen=True)
class EndedJob:
    """A job as accounting knows it; state is one word, such as CANCELLED."""

    state: str
    directory: str = ""
