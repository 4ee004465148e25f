"""Cancels the queued and running jobs of rows or stages; run directories are kept.

TARGET is a row, a suite, or the name of a run directory. A stage that a job of another row still depends on is not
cancelled, unless that row is given too.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next
from launch.cli.parser import Parser, run_command
from launch.job.record import Record, jobs_in_queue, locked, read_record
from launch.plan.graph import build_graph
from launch.slurm.client import slurm
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
        if doomed:
            slurm.cancel(record.job_id for jobs in doomed.values() for record in jobs)
    for stage, jobs in doomed.items():
        print(f"cancelled: {stage}, job {', '.join(record.job_id for record in jobs)}")
    for stage in sorted(needed & targets):
        print(f"left alone, since jobs of other rows wait for it: {stage}")
    records = {stage: read_record(RunDirectory(runs / stage)) for stage in sorted(targets)}
    local = {stage: record for stage, record in records.items() if record and record.runs_locally}
    for stage, record in local.items():
        where = f"on {record.attempts[-1].host} as {record.job_id}"
        print(f"runs without SLURM: {stage}, {where}; stop it there with Ctrl-C")
    if not doomed and not local:
        print("nothing to cancel: no stage of these targets is queued or running")
    if request.rows:
        print_next([("resume from the last checkpoint", command("submit.py", *request.row_words))])
    return 0


def active_jobs(runs: Path) -> dict[str, list[Record]]:
    """Stage id -> records of its queued or running jobs, for the whole runs folder."""
    found: dict[str, list[Record]] = {}
    for path in (*runs.glob("*/job.json"), *sorted(runs.glob("*/shards/*/job.json"))):
        record = read_record(RunDirectory(path.parent))
        if record and not record.is_local:
            found.setdefault(path.relative_to(runs).parts[0], []).append(record)
    queued = jobs_in_queue(record for records in found.values() for record in records)
    alive = {stage: [record for record in records if record.job_id in queued] for stage, records in found.items()}
    return {stage: records for stage, records in alive.items() if records}


def still_needed(active: dict[str, list[Record]], targets: set[str]) -> set[str]:
    """Stages that jobs outside `targets` depend on, directly or through other stages."""
    needed: set[str] = set()
    pending = [record for stage, records in active.items() if stage not in targets for record in records]
    while pending:
        for parent in pending.pop().parents:
            if parent not in needed:
                needed.add(parent)
                pending += active.get(parent, [])
    return needed


if __name__ == "__main__":
    sys.exit(run_command(main))
