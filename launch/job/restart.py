"""Whether a job starts its processes again in the allocation that it holds, and on which of its nodes.

It does so after every fault that leaves it enough nodes: killed and crashed processes, hangs, errors of the disk. A
node that the fault is blamed on, or that is lost, is left out if a spare one takes its place.
"""

import os
import time
from collections.abc import Sequence

from launch.job.disk import try_to
from launch.job.log import say
from launch.job.record import Record
from launch.slurm.client import slurm
from launch.slurm.exclusion import blamed_hosts
from launch.slurm.jobs import QueuedJob
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory

GUARD = "guard"  # name of the step of launch.job.guard
SHORTEST_SECONDS = 60.0  # of an attempt, between its start and the warning before the time limit
SECONDS_FOR_PROCESSES = 10  # to go after SIGKILL; a step on a lost node never ends for SLURM


def srun_options(files: RunDirectory, record: Record, start: int) -> list[str]:
    """Which nodes the processes use: all, or all but the spare ones, which are blamed and lost ones if there are such.

    start: how often the job has started its processes again in this allocation.

    Raises:
        ConfigError: too few nodes are left, and the job is requeued; or there is no scontrol.
    """
    options = ["--overlap"] if start else []  # a step that SLURM believes to run on a lost node holds the others
    if not record.spare_nodes:
        return options
    allocated = _allocated(record, start)
    if len(allocated) < record.nodes:  # SLURM has requeued the job after the loss of some
        slurm.requeue(record.job_id)
        slurm.resize(record.job_id, record.nodes + record.spare_nodes)
        raise ConfigError(f"only {len(allocated)} of {record.nodes} nodes are left; the job is requeued")
    blamed = try_to("faults.jsonl", lambda: blamed_hosts([files.whole.path])) or []
    nodes = choose(allocated, record.nodes, blamed)
    say(f"=== the processes run on {', '.join(nodes)}; spare: {', '.join(set(allocated) - set(nodes)) or 'none'}")
    tasks = len(nodes) * int(os.environ["SLURM_NTASKS_PER_NODE"])
    return [*options, f"--nodes={len(nodes)}", f"--ntasks={tasks}", f"--nodelist={','.join(nodes)}"]


def reason_to_requeue(files: RunDirectory, record: Record, job: QueuedJob) -> str | None:
    """Why the next attempt needs another allocation; None if this one will do. Ends what is left of the processes."""
    if not record.folder:
        return "job.json cannot be read"
    if job.seconds_left - record.warning_seconds < max(record.warning_seconds, SHORTEST_SECONDS):
        return "its time limit is near"
    if slurm.is_preempted(record.job_id):
        return "it is preempted"
    blamed = blamed_since(files, record.attempts[-1].started)
    if not record.spare_nodes and blamed:
        return f"{', '.join(blamed)} is to blame, and it has no spare nodes"
    if record.spare_nodes:
        try:
            allocated = slurm.hostnames(job.nodes)
        except ConfigError as error:
            return str(error)
        if len(allocated) < record.nodes:
            return f"only {len(allocated)} of {record.nodes} nodes are left"
        nodes = choose(allocated, record.nodes, blamed)
        if bad := set(nodes) & set(blamed):
            return f"{', '.join(sorted(bad))} is to blame, and no spare node is left"
    _end_processes(record.job_id)
    return None


def choose(allocated: Sequence[str], count: int, blamed: Sequence[str]) -> list[str]:
    """`count` of the allocated nodes, in their order: those not blamed first, then those blamed longest ago.

    blamed: newest first.
    """
    age = {node: len(blamed) - place for place, node in enumerate(blamed)}
    chosen = sorted(allocated, key=lambda node: age.get(node, 0))[:count]
    return [node for node in allocated if node in chosen]


def blamed_since(files: RunDirectory, since: str) -> list[str]:
    """The hosts that faults are blamed on since a time, as in job.json."""
    faults = try_to("faults.jsonl", files.whole.read_faults) or []
    return sorted({host for fault in faults if fault["time"] >= since for host in fault["hosts"]})


def _allocated(record: Record, start: int) -> list[str]:
    """The nodes of the allocation, without those that SLURM has removed from it since the job began."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    if start:
        try:
            job = slurm.queue([record.job_id]).get(record.job_id)
            nodes = job.nodes if job is not None and job.nodes else nodes
        except ConfigError as error:
            say(f"=== {error}")
    return slurm.hostnames(nodes)


def _end_processes(job_id: str) -> None:
    """Kills the processes of an attempt whose srun was killed: they would hold the GPUs."""
    for second in range(SECONDS_FOR_PROCESSES):
        steps = slurm.steps(job_id, but=GUARD)
        if not steps:
            return
        if second == 0:
            slurm.kill_steps(steps)
        time.sleep(1)
