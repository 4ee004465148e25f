"""Requeues a job whose first node is lost. Runs on its other nodes, if it has spare ones.

    python -m launch.job.guard <folder of the submission> <first node>

Such a job outlasts the loss of a node, its batch script does not outlast that of the first node, and SLURM then lets
the job run without it until its time limit.
"""

import signal
import sys
import time
from pathlib import Path

from launch.job.students import folders_of, own_members
from launch.job.this_job import job_id
from launch.slurm.client import PATIENT, slurm
from mvd.config import ConfigError

SECONDS_BETWEEN = 30.0


def main(arguments: list[str]) -> int:
    """Watches until the job ends or is requeued."""
    submission, first = arguments
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # meant for the processes of the stage
        signal.signal(number, signal.SIG_IGN)
    slurm.pauses = PATIENT
    while True:
        time.sleep(SECONDS_BETWEEN)
        try:
            job = slurm.queue([job_id()]).get(job_id())
            if job is None or job.state == "PENDING":
                return 0
            # squeue lists only nodes with processes of a job that is COMPLETING
            if job.runs and job.nodes and first not in slurm.hostnames(job.nodes):
                return _requeue(submission)
        except ConfigError:  # SLURM does not answer
            continue


def _requeue(submission: str) -> int:
    members = own_members(folders_of(Path(submission)), job_id())
    refused = slurm.requeue(job_id())
    if not refused and members:
        slurm.resize(job_id(), members[0].record.nodes + members[0].record.spare_nodes)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
