"""Submits a plan to SLURM: what is complete is skipped, what is queued is attached to, the rest becomes arrays."""

import contextlib
import dataclasses
import io
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.cli.output import command, print_next, print_table
from launch.cli.parser import Request
from launch.cluster import Cluster
from launch.job.attempts import FOLDERS
from launch.job.record import Record, locked, now, read_record, write_record
from launch.local.run import generate_data
from launch.plan.arrays import Array, build_arrays
from launch.plan.graph import Node
from launch.slurm import client as slurm
from launch.slurm.exclusion import blamed_hosts, excludable_hosts, exclusion
from launch.slurm.script import explain, parameters
from launch.snapshot import take_snapshot
from mvd.config import ConfigError
from mvd.files import write_json, write_text
from mvd.stage import Stage


def submit_plan(request: Request, nodes: Sequence[Node], stages: Sequence[Stage]) -> int:
    """Submits what is neither complete nor queued, and says what became of each stage; returns the exit code.

    Raises:
        ConfigError: there is no SLURM here, it refuses a job, or the runs folder cannot be written.
    """
    if not slurm.is_available():
        here = command("submit.py", *request.words, "--local")
        raise ConfigError(f"there is no sbatch on this machine; log in to the cluster, or run the rows here: {here}")
    runs = Path(request.cluster.runs)
    rows = {node.id: list(node.rows) for node in nodes}
    parents = {node.id: node.stage_parents for node in nodes}
    with locked(runs):
        for stage in stages:
            generate_data(stage)
        missing = [stage for stage in stages if not stage.files.read_result()]
        queued = queued_stages(missing)
        to_submit = [stage for stage in missing if stage.id not in queued]
        arrays = build_arrays(nodes, to_submit, queued, request.cluster)
        submitted: dict[str, str] = {}  # name in the plan -> job id
        code = take_snapshot(runs)
        for array in arrays:
            try:
                record = submit_array(array, request.cluster, code, submitted)
            except ConfigError as error:
                raise ConfigError(_with_progress(str(error), submitted, len(arrays))) from error
            submitted[array.name] = record.job_id
            write_records(array, record, rows, parents)
    _print_submission(request, stages, queued, arrays, submitted)
    return 0


def queued_stages(stages: Sequence[Stage]) -> dict[str, str]:
    """Stage id -> job id of the stages that are queued or running; a split test's job id is its whole array's."""
    jobs: dict[str, list[str]] = {}
    for stage in stages:
        records = [record for files in stage.files.job_files() if (record := read_record(files))]
        jobs[stage.id] = [record.job_id for record in records]
        if any(record.runs_locally for record in records):
            raise ConfigError(f"{stage.id} is running without SLURM, as {jobs[stage.id][0]}; let it end, or stop it")
    alive = slurm.queue(job for ids in jobs.values() for job in ids)
    found = {}
    for stage_id, ids in jobs.items():
        present = [job for job in ids if job in alive]
        if present:
            found[stage_id] = present[0] if len(ids) == 1 else present[0].partition("_")[0]
    return found


def submit_array(array: Array, cluster: Cluster, code: Path, submitted: Mapping[str, str]) -> Record:
    """Submits an array, which avoids the machines that its stages' faults have named as far as SLURM lets it.

    Returns the record of the whole array, without rows and parents.

    Raises:
        ConfigError: sbatch refuses; its own message, and the field to change.
    """
    from launch.job.stage_job import StageJob

    parts = [part for stage in array.stages for part in stage.in_shards()]
    folder = new_folder(Path(cluster.runs) / "jobs", array.stages[0].kind)
    for stage in array.stages:
        stage.directory.mkdir(parents=True, exist_ok=True)
        write_text(stage.files.stage, stage.to_yaml())
    write_json(folder / FOLDERS, [str(part.job_directory) for part in parts])
    jobs = [StageJob(str(part.directory), part.execution.shard) for part in parts]
    named = avoided = blamed_hosts(stage.directory for stage in array.stages)
    while True:
        exclude = exclusion(cluster.slurm.excluded, avoided)
        how = parameters(array, cluster, code, folder, resolve(array.dependency, submitted), exclude)
        try:
            job = call_sbatch(folder, how, jobs, array.stages[0].kind)
            break
        except ConfigError:
            if not avoided:
                raise
            avoided = avoided[:-1]  # the job may not be able to do without it
    own = cluster.slurm.excluded
    record = Record(job, str(folder), now(), array.layout.nodes, [], [], exclude=own, avoided=avoided)
    drop_impossible_exclusions(record)
    for host in named:
        fate = "is avoided" if host in record.avoided else "would be avoided, if the job could run without it"
        print(f"{host}, which faults of the last day have named, {fate}")
    return record


def drop_impossible_exclusions(record: Record) -> None:
    """Avoids fewer machines where the job could never run: sbatch asks that only of jobs that may start at once."""
    possible, _ = excludable_hosts(record.script, record.exclude, record.avoided)
    if possible != record.avoided and not slurm.exclude(record.job_id, exclusion(record.exclude, possible)):
        record.avoided = possible


def new_folder(parent: Path, what: str) -> Path:
    """Makes the folder of one call of sbatch, for its scripts and logs."""
    stamp = re.sub(r"\D", "", now())[:14]
    folder = parent / f"{stamp}-{what}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def call_sbatch(folder: Path, how: Mapping[str, Any], jobs: Sequence[Callable[[], None]], what: str) -> str:
    """Calls sbatch once, through submitit; returns the job id, which is the whole array's where there are several jobs.

    Raises:
        ConfigError: sbatch refuses; its own message, and the field to change.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    executor = SlurmExecutor(folder, max_num_timeout=sys.maxsize)  # of the jobs that leave requeueing to submitit
    executor.update_parameters(**how)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where submitit repeats what the error says
            submitted = executor.submit_array(jobs)
    except FailedJobError as error:
        raise ConfigError(explain(what, str(error))) from error
    return submitted[0].job_id.partition("_")[0]


def resolve(text: str, submitted: Mapping[str, str]) -> str:
    """Puts job ids for the names of arrays: `afterok:#1_3` becomes `afterok:24_3`."""
    return re.sub(r"#\d+", lambda name: submitted[name.group()], text)


def write_records(array: Array, whole: Record, rows: Mapping[str, list[str]], parents: Mapping[str, list[str]]) -> None:
    """Notes in each element's folder under which job it was submitted."""
    parts = [part for stage in array.stages for part in stage.in_shards()]
    for index, part in enumerate(parts):
        job = whole.job_id if len(parts) == 1 else f"{whole.job_id}_{index}"
        record = dataclasses.replace(whole, job_id=job, rows=rows[part.id], parents=parents[part.id])
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
