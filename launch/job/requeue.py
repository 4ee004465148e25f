"""How a job goes back into the queue under its id, and which nodes it avoids from then on."""

from collections.abc import Sequence

from launch.job.disk import try_to
from launch.job.log import say
from launch.job.record import Record
from launch.job.this_job import job_id, queue_state
from launch.slurm.client import slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from mvd.run_directory import RunDirectory


def requeue(folders: Sequence[RunDirectory], record: Record, asks: bool) -> int:
    """Requeues the job, then sets the nodes to avoid, which SLURM changes only while a job waits.

    folders: of its stages. record: of one of them, in which what follows is noted. Returns the exit code of the job.
    asks: whether to ask SLURM first which nodes the job can do without; not if it does not answer.
    """
    attempt = record.attempts[-1]
    if not slurm.has("scontrol") and record.requeue_exit is not None:
        say(f"=== exiting with code {record.requeue_exit}, after which SLURM requeues the job")
        return record.requeue_exit
    blamed = try_to("faults.jsonl", lambda: blamed_hosts([files.whole.path for files in folders])) or []
    if asks:
        avoided, reason = excludable_hosts(record.script, record.exclude, blamed)
    else:
        avoided, reason = record.avoided, "squeue did not answer"
    refused = slurm.requeue(job_id())
    if refused and queue_state()[0] in ("RUNNING", None):  # not if it has been requeued, and only the answer was lost
        record.error = f"it could not be requeued ({refused}); after: {attempt.error}"
        say(f"=== {record.error}")
        return 1
    if record.outlasts_nodes and (refused := slurm.resize(job_id(), record.nodes + record.spare_nodes)):
        say(f"=== it asks for the nodes that are left: {refused}")
    if avoided != record.avoided:
        refused = slurm.exclude(job_id(), exclusion(record.exclude, avoided))
        reason = refused or reason
        record.avoided = record.avoided if refused else avoided
    if record.avoided:
        say(f"=== the next attempt avoids {', '.join(record.avoided)}")
    for host in sorted(set(blamed) - set(record.avoided)):
        attempt.error = f"{attempt.error}\n{host} is not avoided: {reason}"
        say(f"=== {host} is not avoided: {reason}")
    return 1
