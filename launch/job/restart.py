"""Whether a job starts its processes again in the allocation that it holds, and on which of its nodes.

It does so after every fault that leaves it enough nodes: killed and crashed processes, hangs, errors of the disk. A
node that the fault is blamed on, or that is lost, is left out if a spare one takes its place, or if the profile lets
the job go on with fewer processes.
"""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from launch.cluster import largest_layout
from launch.job.disk import try_to
from launch.job.log import say
from launch.job.record import Member, Record
from launch.job.verdict import without_progress
from launch.slurm.client import slurm
from launch.slurm.exclusion import blamed_hosts
from launch.slurm.jobs import QueuedJob
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory

GUARD = "guard"  # name of the step of launch.job.guard
SHORTEST_SECONDS = 60.0  # of an attempt, between its start and the warning before the time limit
SECONDS_FOR_PROCESSES = 10  # to go after SIGKILL; a step on a lost node never ends for SLURM


class Place(NamedTuple):
    """Where the processes of a start run: which nodes, how many on each, and how many of them if they are fewer."""

    nodes: list[str]
    per_node: int
    shrunk_to: int = 0


def place_for(folders: Sequence[RunDirectory], record: Record, start: int) -> Place | None:
    """Nodes of the next processes: as many as planned, without spare, lost and blamed ones; or fewer, if that may be.

    folders: of the stages that will run, and record: of one of them. start: how often the job has started its processes
    again in this allocation. Returns None for all of the job's.

    Raises:
        ConfigError: too few nodes are left, and the job is requeued; or there is no scontrol.
    """
    if not record.outlasts_nodes:
        return None
    allocated = _allocated(record, start)
    place = _place(folders, record, allocated, start)
    if place is None:  # SLURM has requeued the job after the loss of some, or removes them only now
        slurm.requeue(record.job_id)
        slurm.resize(record.job_id, record.nodes + record.spare_nodes)
        raise ConfigError(f"only {len(allocated)} of {record.nodes} nodes are left; the job is requeued")
    others = set(allocated) - set(place.nodes)
    say(f"=== the processes run on {', '.join(place.nodes)}; not used: {', '.join(sorted(others)) or 'none'}")
    if place.shrunk_to:
        say(f"=== they are {place.shrunk_to} instead of {record.nodes * _per_node()}, until the job is requeued")
    return place


def srun_options(place: Place | None, start: int) -> list[str]:
    """srun's options for the processes of a start."""
    options = ["--overlap"] if start else []  # a step that SLURM believes to run on a lost node holds the others
    if place is None:
        return options
    nodes, tasks = len(place.nodes), len(place.nodes) * place.per_node
    each = [f"--ntasks-per-node={place.per_node}"] if place.shrunk_to else []
    return [*options, f"--nodes={nodes}", f"--ntasks={tasks}", *each, f"--nodelist={','.join(place.nodes)}"]


def reason_to_requeue(folders: Sequence[RunDirectory], members: Sequence[Member], job: QueuedJob) -> str | None:
    """Why the next attempt needs another allocation; None if this one will do. Ends what is left of the processes.

    folders: of all stages of the job. members: the stages that are to go on.
    """
    record = members[0].record
    if not record.folder:
        return "job.json cannot be read"
    if job.seconds_left - record.warning_seconds < max(record.warning_seconds, SHORTEST_SECONDS):
        return "its time limit is near"
    if slurm.is_preempted(record.job_id):
        return "it is preempted"
    attempt = record.attempts[-1]
    if attempt.shrunk_to and without_progress(members):
        return f"it has saved nothing new with {attempt.shrunk_to} processes"  # they may have too little memory
    if not record.outlasts_nodes and (blamed := blamed_since(folders, attempt.started)):
        return f"{', '.join(blamed)} is to blame, and it has no spare nodes"
    if record.outlasts_nodes:
        try:
            allocated = slurm.hostnames(job.nodes)
        except ConfigError as error:
            return str(error)
        if _place(folders, record, allocated, attempt.start + 1) is None:
            if len(allocated) < record.nodes:
                return f"only {len(allocated)} of {record.nodes} nodes are left"
            blamed = blamed_since(folders, _start_of_allocation(record))
            return f"{', '.join(blamed)} is to blame, and no spare node is left"
    _end_processes(record.job_id)
    return None


def _place(folders: Sequence[RunDirectory], record: Record, allocated: Sequence[str], start: int) -> Place | None:
    """As `place_for`; None if too few nodes are left.

    Nodes that were blamed in this allocation are left out, those that were blamed before only if there are others:
    SLURM has given them although they were to be avoided.
    """
    bad = blamed_since(folders, _start_of_allocation(record)) if start else []
    good = [node for node in allocated if node not in bad]
    if len(good) >= record.nodes:
        blamed = try_to("faults.jsonl", lambda: blamed_hosts([files.whole.path for files in folders])) or []
        return Place(choose(good, record.nodes, blamed), _per_node())
    layout = largest_layout(record.fewer, len(good), _per_node()) if start else None
    return Place(good[: layout.nodes], layout.gpus, layout.nodes * layout.gpus) if layout else None


def _start_of_allocation(record: Record) -> str:
    """When the job began in the allocation that it holds; called only once it has."""
    first = [attempt for attempt in record.attempts if attempt.job_id == record.job_id and attempt.start == 0]
    return (first or record.attempts)[-1].started


def _per_node() -> int:
    return int(os.environ["SLURM_NTASKS_PER_NODE"])


def choose(allocated: Sequence[str], count: int, blamed: Sequence[str]) -> list[str]:
    """`count` of the allocated nodes, in their order: those not blamed first, then those blamed longest ago.

    blamed: newest first.
    """
    age = {node: len(blamed) - place for place, node in enumerate(blamed)}
    chosen = sorted(allocated, key=lambda node: age.get(node, 0))[:count]
    return [node for node in allocated if node in chosen]


def blamed_since(folders: Sequence[RunDirectory], since: str) -> list[str]:
    """The hosts that faults of these stages are blamed on since a time, as in job.json."""
    faults = [fault for files in folders for fault in try_to("faults.jsonl", files.whole.read_faults) or []]
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
