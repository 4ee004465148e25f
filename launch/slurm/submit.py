"""Submits a plan to SLURM: complete stages are skipped, queued ones are left alone, the others become arrays."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cli.output import command, print_next, print_table, sentence_of
from launch.cli.parser import Request
from launch.cluster import Cluster
from launch.job.record import Record, has_left, jobs_in_queue, locked, now, read_record, write_record
from launch.job.students import FOLDERS
from launch.local.run import generate_data
from launch.plan.arrays import Array, build_arrays
from launch.plan.differences import note_rows
from launch.plan.graph import Node
from launch.slurm.client import slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from launch.slurm.jobs import QueuedJob
from launch.slurm.sbatch import call_sbatch, new_folder, write_script
from launch.slurm.script import parameters, spare_nodes
from launch.snapshot import take_snapshot
from mvd.batch import working_world_sizes
from mvd.config import ConfigError, Test
from mvd.files import write_json, write_text
from mvd.stage import Stage

SECONDS_FOR_CLEANUP = 120.0  # of jobs that have just ended
POLL_SECONDS = 2.0


def require_slurm(request: Request) -> None:
    """Raises ConfigError if there is no SLURM here."""
    slurm.require(f"run the rows here: {command('submit.py', *request.plan_words, '--local')}")


def submit_plan(
    request: Request, nodes: Sequence[Node], stages: Sequence[Stage], groups: Sequence[Sequence[str]] = ()
) -> int:
    """Submits the stages that are neither complete nor queued, and prints what it did; returns the exit code.

    groups: ids of the stages that run in one job (launch.plan.together).

    Raises:
        ConfigError: there is no SLURM here, it rejects a job, or the runs folder cannot be written.
    """
    require_slurm(request)
    runs = Path(request.cluster.runs)
    rows = {node.id: list(node.rows) for node in nodes}
    parents = {node.id: node.stage_parents for node in nodes}
    with locked(runs):
        for stage in stages:
            generate_data(stage)
        missing = [stage for stage in stages if not stage.files.read_result()]
        queued = queued_stages(missing)
        missing = [stage for stage in missing if stage.id in queued or not stage.files.read_result()]  # by now
        _cancel_orphans(nodes, missing, queued)
        to_submit = [stage for stage in missing if stage.id not in queued]
        arrays = build_arrays(nodes, to_submit, queued, request.cluster, groups, slurm.largest_array())
        submitted: dict[str, str] = {}  # name in the plan -> job id
        code = take_snapshot(runs)
        for array in arrays:
            try:
                submitted[array.name] = submit_array(array, request.cluster, code, submitted, rows, parents)
            except (ConfigError, OSError) as error:
                raise ConfigError(_with_progress(sentence_of(error), submitted, len(arrays))) from error
        try:
            note_rows(request.rows, nodes, runs)
        except OSError as error:  # the jobs are in the queue and need it not
            print(f"{error.filename}: {error.strerror}; report.py without a row will not show these targets")
    _print_submission(request, stages, queued, arrays, submitted)
    return 0


def _cancel_orphans(nodes: Sequence[Node], missing: Sequence[Stage], queued: dict[str, str]) -> None:
    """Cancels queued jobs, and takes them out of `queued`, whose parent has to be submitted again.

    They wait for another job, such as that of a group from which their parent was cancelled, or in which it failed.
    """
    again = {stage.id for stage in missing if stage.id not in queued}
    for node in nodes:  # parents first
        if node.id in queued and again & set(node.stage_parents):
            job = queued.pop(node.id)
            slurm.cancel([job])
            print(f"cancelled: {node.id}, job {job}, since the stage that it waits for is submitted again")
            again.add(node.id)


def queued_stages(stages: Sequence[Stage]) -> dict[str, str]:
    """Stage id -> job id of the stages that are queued or running; a split test's job id is its whole array's.

    Raises:
        ConfigError: a stage is running without SLURM, or SLURM does not finish cleaning up after its job.
    """
    jobs: dict[str, list[str]] = {}
    records: list[Record] = []
    for stage in stages:
        own = [r for files in stage.files.job_files() if (r := read_record(files)) and not has_left(files, r)]
        jobs[stage.id] = [record.job_id for record in own]
        if any(record.runs_locally for record in own):
            raise ConfigError(f"{stage.id} is running without SLURM, as {own[0].job_id}; let it end, or stop it")
        records += own
    alive = _settled(records)
    found = {}
    for stage_id, ids in jobs.items():
        present = [job for job in ids if job in alive]
        if present:
            found[stage_id] = present[0] if len(ids) == 1 else present[0].partition("_")[0]
    return found


def _settled(records: Sequence[Record]) -> Mapping[str, QueuedJob]:
    """The records' jobs in the queue, once none of them is COMPLETING: such a job has ended, or will be requeued."""
    deadline = time.monotonic() + SECONDS_FOR_CLEANUP
    said = False
    while True:
        alive = jobs_in_queue(records)
        ending = sorted(job for job, entry in alive.items() if entry.is_completing)
        if not ending:
            return alive
        jobs = ", ".join(ending)
        if time.monotonic() > deadline:
            raise ConfigError(f"job {jobs} has ended, but SLURM is still COMPLETING it; submit again when it is gone")
        if not said:
            print(f"waiting for the end of job {jobs}, which SLURM is COMPLETING", flush=True)
        said = True
        time.sleep(POLL_SECONDS)


def submit_array(
    array: Array,
    cluster: Cluster,
    code: Path,
    submitted: Mapping[str, str],
    rows: Mapping[str, list[str]],
    parents: Mapping[str, list[str]],
) -> str:
    """Submits an array, which avoids the hosts that its stages' faults were blamed on as far as SLURM lets it.

    Returns the job id of the whole array; each element's record is in its folder.

    Raises:
        ConfigError: sbatch fails, with its own message and the field to change; or a record cannot be written.
    """
    from launch.job.stage_job import StageJob

    folder = new_folder(Path(cluster.runs) / "jobs", array.stages[0].kind)
    for stage in array.stages:
        stage.directory.mkdir(parents=True, exist_ok=True)
        write_text(stage.files.stage, stage.to_yaml())
    write_json(folder / FOLDERS, [[str(part.job_directory) for part in parts] for parts in array.jobs])
    dependency, own = resolve(array.dependency, submitted), cluster.slurm.excluded
    how = parameters(array, cluster, code, folder, dependency, own)
    blamed = blamed_hosts(stage.directory for stage in array.stages)
    avoided, _ = excludable_hosts(write_script(folder, how, array.size), own, blamed)
    how = parameters(array, cluster, code, folder, dependency, exclusion(own, avoided))
    jobs = [StageJob([str(part.directory) for part in parts], parts[0].execution.shard) for parts in array.jobs]
    job = call_sbatch(folder, how, jobs, array.stages[0].kind)
    record = Record(job, str(folder), now(), array.layout.nodes, [], [], exclude=own, avoided=avoided)
    record.directory, record.requeue_exit = str(folder), slurm.requeue_exit()
    record.spare_nodes, record.warning_seconds = spare_nodes(array, cluster.slurm), cluster.slurm.warning_seconds
    try:
        write_records(array, record, rows, parents, shrinks=cluster.slurm.shrink)
    except OSError as error:
        slurm.cancel([job])
        raise ConfigError(f"{error.filename}: {error.strerror}; job {job} is cancelled again; fix that") from error
    for host in blamed:
        fate = "is avoided" if host in avoided else "would be avoided, if the job could run without it"
        print(f"{host}, blamed for faults in the last 24 h, {fate}")
    return job


def resolve(text: str, submitted: Mapping[str, str]) -> str:
    """Substitutes job ids for the names of arrays: `afterok:#1_3` becomes `afterok:24_3`."""
    return re.sub(r"#\d+", lambda name: submitted[name.group()], text)


def write_records(
    array: Array, whole: Record, rows: Mapping[str, list[str]], parents: Mapping[str, list[str]], shrinks: bool
) -> None:
    """Writes the record of each stage or shard into its folder. shrinks: if jobs may go on with fewer processes."""
    for index, parts in enumerate(array.jobs):
        record = dataclasses.replace(whole, job_id=whole.job_id if array.size == 1 else f"{whole.job_id}_{index}")
        if shrinks and array.layout.nodes > 1 and not isinstance(parts[0].recipe, Test):
            sizes = set.intersection(*(set(working_world_sizes(part.recipe)) for part in parts))
            record.fewer = sorted(size for size in sizes if size < array.layout.nodes * array.layout.gpus)
        for part in parts:
            record.rows, record.parents = rows[part.id], parents[part.id]
            record.together = [other.id for other in parts if other.id != part.id]
            write_record(part.job_files, record)


def _with_progress(message: str, submitted: Mapping[str, str], total: int) -> str:
    if not submitted:
        return message
    return f"{message} ({len(submitted)} of {total} arrays are queued already; submit again, and the rest joins them)"


def _print_submission(
    request: Request,
    stages: Sequence[Stage],
    queued: Mapping[str, str],
    arrays: Sequence[Array],
    submitted: Mapping[str, str],
) -> None:
    complete = len(stages) - len(queued) - sum(len(array.stages) for array in arrays)
    if arrays:
        columns = ["job", "kind", "stages", "nodes x GPUs", "after"]
        lines = [
            [
                f"{submitted[array.name]}[0-{array.size - 1}]" if array.size > 1 else submitted[array.name],
                array.stages[0].kind,
                "\n".join(stage.id for stage in array.stages),
                str(array.layout),
                resolve(array.dependency, submitted) or "-",
            ]
            for array in arrays
        ]
        print_table("submitted to SLURM", columns, lines)
    for stage_id, job in queued.items():
        print(f"queued or running already: {stage_id}, job {job}")
    if complete:
        print(f"complete already: {complete} of {len(stages)} stages")
    print_next(
        [
            ("see how far they are", command("status.py", *request.words)),
            ("follow a log", command("logs.py", *request.words, "--follow")),
            ("cancel", command("cancel.py", *request.words)),
            ("see the accuracies, once they are there", command("report.py", *request.words)),
        ]
    )
