"""submit.py --rehearse: short jobs that try every different stage of a plan in its real layout and measure it.

A stage that trains makes 40 updates, saves and resumes; then another job resumes it on about half as many GPUs. A test
reads a few videos. Their run directories are in runs/rehearsals; nothing is written to a stage's own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli.force import move_aside
from launch.cli.output import print_next, print_table
from launch.cli.parser import Request
from launch.cluster import Cluster
from launch.job.record import locked
from launch.local.run import generate_data, run_stages, stop_on_signals
from launch.plan.arrays import Array
from launch.plan.graph import Node
from launch.plan.rehearsals import Job, Planned, plan_rehearsals
from launch.plan.rehearsed import rehearsals_folder
from launch.rehearsal_report import again, print_rehearsals, print_report, states_of
from launch.slurm.client import slurm
from launch.slurm.submit import queued_stages, submit_array
from launch.snapshot import take_snapshot
from mvd.config import ConfigError
from mvd.distributed.exit_codes import STOPPED

HOURS = 1.0  # time limit of a job


def rehearse(request: Request, nodes: Sequence[Node]) -> int:
    """Submits the rehearsals that are neither complete nor queued, or runs them here, and prints what is known.

    Returns 0, 1 if a rehearsal failed, or 130 if the user stopped it.

    Raises:
        ConfigError: options that exclude each other, or a missing data set of one's own; see also submit_array.
    """
    options = request.options
    if any((options.show, options.layouts, options.script, options.together)):
        raise ConfigError("--rehearse goes only with --local, --until, --force and --dry-run; omit the other options")
    if options.force and options.dry_run:
        raise ConfigError("--force changes the runs folder, so it cannot be combined with --dry-run; omit it")
    planned = plan_rehearsals(nodes, request.cluster, options.local)
    if options.force:
        if not options.local:
            _require_slurm(request)
        jobs = _jobs(planned)
        move_aside(options.force, [job.node for job in jobs], [job.stage for job in jobs])
    print_rehearsals(request, planned)
    if options.dry_run:
        print_next([("start them", again(request))])
        return 0
    submitted: list[str] = []
    if not options.local:
        submitted = _submit(request, planned)
    elif _run_here(request, planned) == STOPPED:
        return 130
    return print_report(request, planned, nodes, submitted)


def _jobs(planned: Sequence[Planned]) -> list[Job]:
    """All jobs, those that others resume first."""
    return [job for rehearsal in planned for job in (rehearsal.whole, rehearsal.resumed) if job is not None]


def _run_here(request: Request, planned: Sequence[Planned]) -> int:
    """Runs the rehearsals that are not complete, even if one fails; returns STOPPED if the user stopped them."""
    stop_on_signals()
    jobs = _jobs(planned)
    try:
        for place, job in enumerate(jobs, start=1):
            title, stage = f"[{place}/{len(jobs)}] {job.stage.id}", job.stage
            parents = [other.stage for other in jobs if other.stage.id in job.node.stage_parents]
            if stage.files.read_result():
                print(f"{title}: complete already, skipped", flush=True)
            elif not all(parent.files.read_result() for parent in parents):
                print(f"{title}: skipped, since there is no checkpoint to resume", flush=True)
            else:
                print(f"{title}, {job.layout.gpus} process{'es' * (job.layout.gpus > 1)}", flush=True)
                if run_stages(request.rows, [(job.node, stage)]) == STOPPED:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("\nstopped")
        print_next([("go on", again(request))])
        return STOPPED
    return 0


def _submit(request: Request, planned: Sequence[Planned]) -> list[str]:
    """Submits each rehearsal as a job of its own, and its resume as one that waits for it; returns their names.

    One that has failed is left for the report; --force repeats it.
    """
    cluster = _short_jobs(request.cluster)
    failed = {name for name, state in states_of(request.cluster, planned).items() if state.word == "failed"}
    missing = [
        job
        for job in _jobs(planned)
        if not job.stage.files.read_result() and not failed.intersection((job.stage.id, *job.node.stage_parents))
    ]
    if not missing:
        return []
    _require_slurm(request)
    lines: list[list[str]] = []
    with locked(Path(cluster.runs)):
        queued = queued_stages([job.stage for job in missing])
        code = take_snapshot(Path(request.cluster.runs))
        for job in missing:
            if job.stage.id not in queued:
                generate_data(job.stage)
                queued[job.stage.id] = number = _submit_one(job, cluster, code, queued)
                lines.append([number, job.stage.id, str(job.layout)])
    if lines:
        print_table("submitted to SLURM", ["job", "rehearsal", "nodes x GPUs"], lines)
    return [name for _, name, _ in lines]


def _submit_one(job: Job, cluster: Cluster, code: Path, queued: Mapping[str, str]) -> str:
    waits = [queued[parent] for parent in job.node.stage_parents if parent in queued]
    array = Array("#1", ((job.stage,),), job.layout, ":".join(("afterok", *waits)) if waits else "")
    rows, parents = {job.node.id: list(job.node.rows)}, {job.node.id: job.node.stage_parents}
    return submit_array(array, cluster, code, {}, rows, parents)


def _require_slurm(request: Request) -> None:
    slurm.require(f"rehearse here: {again(request, '--local')}")


def _short_jobs(cluster: Cluster) -> Cluster:
    """The profile for the rehearsals' jobs: their folder, a short time limit, exactly the nodes of the layout."""
    least = 2 * cluster.slurm.warning_seconds / 3600
    hours = min(cluster.slurm.time_limit_hours, max(HOURS, least))
    jobs = dataclasses.replace(cluster.slurm, time_limit_hours=hours, spare_nodes=0, shrink=False)
    return dataclasses.replace(cluster, runs=str(rehearsals_folder(cluster)), slurm=jobs)
