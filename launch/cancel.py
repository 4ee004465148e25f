"""Cancels the queued and running jobs of rows or stages; run directories are kept.

TARGET is a row, a suite, or a run directory. A stage that other jobs wait for is not cancelled, unless those are given
too.
"""

import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next
from launch.cli.parser import Parser, run_command
from launch.job.record import Record, active_jobs, locked, read_record
from launch.job.time_use import read_provenance
from launch.plan.graph import build_graph
from launch.slurm.client import slurm
from mvd.files import write_text
from mvd.owner import give_back, read_owner
from mvd.run_directory import RunDirectory

EXAMPLES = """examples:
  python launch/cancel.py experiments/vith_k400
  python launch/cancel.py experiments/all
"""


def main(argv: Sequence[str]) -> int:
    """Cancels the jobs and prints what was cancelled; returns the exit code."""
    request = Parser("cancel.py", __doc__ or "", EXAMPLES, takes_stages=True).read(argv)
    runs = Path(request.cluster.runs)
    targets = {*request.stages, *(node.id for node in build_graph(request.rows))}
    with locked(runs):
        active = active_jobs(runs)
        needed = still_needed(active, targets)
        doomed = {stage: jobs for stage, jobs in active.items() if stage in targets and stage not in needed}
        going_on = {record.job_id for stage, jobs in active.items() if stage not in doomed for record in jobs}
        if ending := {record.job_id for jobs in doomed.values() for record in jobs} - going_on:
            slurm.cancel(sorted(ending))
        for stage, (record, *_) in doomed.items():
            if record.job_id in going_on:
                take_out(RunDirectory(runs / stage), record)
    for stage, jobs in doomed.items():
        goes_on = ", which goes on with the others" if jobs[0].job_id in going_on else ""
        print(f"cancelled: {stage}, job {', '.join(record.job_id for record in jobs)}{goes_on}")
    left = sorted(needed.keys() & targets & active.keys())
    for stage in left:
        print(f"left alone: {stage}; cancel what waits for it too: {', '.join(sorted(needed[stage]))}")
    records = {stage: read_record(RunDirectory(runs / stage)) for stage in sorted(targets)}
    local = {stage: record for stage, record in records.items() if record and record.runs_locally}
    for stage, record in local.items():
        where = f"on {record.attempts[-1].host} as {record.job_id}"
        print(f"runs without SLURM: {stage}, {where}; stop it there with Ctrl-C")
    if not (doomed or local or left):
        print("nothing to cancel: no stage of these targets is queued or running")
    if request.rows and (doomed or local or left):
        print_next([("resume from the last checkpoint", command("submit.py", *request.row_words))])
    return 0


def take_out(files: RunDirectory, record: Record) -> None:
    """Takes a student out of a job that goes on with others: at once if it trains, else when the job starts.

    Without its owner's record, the processes end it at their next save, for which they are asked here. Later starts of
    the job leave it out.
    """
    write_text(files.cancelled, record.folder)
    owner = read_owner(files)
    if owner is not None and owner.job == record.job_id:
        give_back(files, owner)
    entries = read_provenance(files)
    if owner is not None and entries and entries[-1].get("owner") == owner.name and "training" in entries[-1]:
        slurm.ask_to_save(record.job_id)  # before that, the signal would end the processes


def still_needed(active: Mapping[str, Sequence[Record]], targets: Set[str]) -> dict[str, set[str]]:
    """Stage -> the active stages outside `targets` that depend on it, directly or through other stages."""
    needed: dict[str, set[str]] = {}
    pending = [(stage, record) for stage, records in active.items() if stage not in targets for record in records]
    while pending:
        waiting, record = pending.pop()
        for parent in record.parents:
            if waiting not in needed.setdefault(parent, set()):
                needed[parent].add(waiting)
                pending += [(waiting, other) for other in active.get(parent, [])]
    return needed


if __name__ == "__main__":
    sys.exit(run_command(main))
