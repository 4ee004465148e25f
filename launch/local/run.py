"""Runs a plan's stages on this machine, one after the other."""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cli.output import command, print_next, print_table, short, tensorboard
from launch.cli.parser import Request
from launch.cluster import CODE, Cluster
from launch.job.ownership import is_gone
from launch.job.record import ON_REQUEST, Attempt, Record, locked, now, refuse_active, write_record
from launch.local.processes import run_processes
from launch.plan.differences import note_rows
from launch.plan.graph import Node
from launch.report import interval_text, print_report, row_results
from launch.stage_state import result_text
from mvd.config import ConfigError, Row, dataset_of
from mvd.distributed.exit_codes import STOPPED
from mvd.files import write_text
from mvd.flops import saved_tflop, total_tflop
from mvd.host import count_gpus, gpu_memory_gb, hostname
from mvd.owner import VARIABLE, Owner, give_back, read_owner, take
from mvd.stage import Stage

CORES = len(os.sched_getaffinity(0))
MOST_PAIRS = 3  # confused classes that are printed of a test
LOGS = "logs"  # in the run directory: what the processes printed, one file per attempt and rank


def this_machine(cluster: Cluster) -> Cluster:
    """The profile for this machine alone: one process per GPU, or `local_processes` processes on the CPU."""
    gpus = count_gpus()
    processes = gpus or cluster.local_processes
    return dataclasses.replace(
        cluster,
        nodes=1,
        gpus_per_node=processes,
        gpu_memory_gb=(cluster.gpu_memory_gb or gpu_memory_gb()) if gpus else None,
        test_shards=1,
        precision=cluster.precision or ("bf16" if gpus else "fp32"),
        workers=min(cluster.workers, max(1, CORES // processes)),
        image_teacher=dataclasses.replace(cluster.image_teacher, nodes=None),
        video_teacher=dataclasses.replace(cluster.video_teacher, nodes=None),
        pretrain=dataclasses.replace(cluster.pretrain, nodes=None),
        finetune=dataclasses.replace(cluster.finetune, nodes=None),
        test=dataclasses.replace(cluster.test, nodes=None),
    )


def run_plan(
    request: Request, nodes: Sequence[Node], stages: Sequence[Stage], groups: Sequence[Sequence[str]] = ()
) -> int:
    """Runs the stages that have no result yet, then prints each stage's time and the rows' accuracies.

    groups: ids of the stages that run together (launch.plan.together).

    Returns 0, 1 if a stage failed, or 130 if the user stopped it; the same command resumes from there.

    Raises:
        ConfigError: a stage's input is missing, or its data could not be generated.
    """
    again = command("submit.py", *request.plan_words, "--local")
    ran_together: list[list[Stage]] = []
    stop_on_signals()
    try:
        for position, (node, stage) in enumerate(zip(nodes, stages, strict=True), start=1):
            title = f"[{position}/{len(stages)}] {stage.id}"
            if stage.files.read_result():
                print(f"{title}: complete already, skipped", flush=True)
                note_rows(request.rows, [node], Path(request.cluster.runs))
                continue
            job = _job_of(stage, nodes, stages, groups)
            ran_together += [[other for _, other in job]] if len(job) > 1 else []
            print(", together with ".join([title, *(other.id for _, other in job[1:])]), flush=True)
            code = run_stages(request.rows, job)
            if code == STOPPED:
                raise KeyboardInterrupt
            missing = [other.id for _, other in job if not other.files.read_result()]
            if code or missing:
                print(
                    f"error: {', '.join(missing or [stage.id])} ended with exit code {code} and no result; "
                    f"see its messages above, which {short(stage.directory / LOGS)} keeps",
                    file=sys.stderr,
                )
                print_next([("once the cause is fixed, resume from the last checkpoint", again)])
                return 1
    except KeyboardInterrupt:
        print("\nstopped")
        print_next([("resume from the last checkpoint", again)])
        return 130
    print_results(request, stages, ran_together)
    return 0


def stop_on_signals() -> None:
    """Makes `kill` act like Ctrl-C, and so closing the terminal, unless run under nohup."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _job_of(
    stage: Stage, nodes: Sequence[Node], stages: Sequence[Stage], groups: Sequence[Sequence[str]]
) -> list[tuple[Node, Stage]]:
    """The stages that run with this one and are not complete, this one first."""
    group = next((group for group in groups if stage.id in group), [stage.id])
    members = [(n, s) for n, s in zip(nodes, stages, strict=True) if s.id in group and not s.files.read_result()]
    return sorted(members, key=lambda member: member[1].id != stage.id)


def run_stages(rows: Sequence[Row], job: Sequence[tuple[Node, Stage]]) -> int:
    """Runs one stage, or several that share their teachers, as one job; returns the exit code.

    Generates the data before, if it needs that. The logs are in the first stage's run directory.

    Raises:
        ConfigError: an input is missing, or a stage is already queued or running.
    """
    first = job[0][1]
    generate_data(first)
    for _, stage in job:
        for role, path in stage.inputs.items():
            if not Path(path).is_file():
                raise ConfigError(f"{stage.id}: its {role} input {path} does not exist; run that stage again")
    records = _take_over(rows, job)
    attempts = [record.attempts[-1] for record in records]
    owner = _owner_of(attempts[0])
    processes = first.execution.world_size
    start_logs(records[0], processes)
    error = None
    try:
        variables = environment(processes) | {VARIABLE: owner.name}
        code = run_processes(stage_command(*(stage for _, stage in job)), processes, variables, records[0].log)
        error = f"exit code {code}" if code else None
        return code
    except KeyboardInterrupt:
        error = ON_REQUEST
        raise
    finally:
        for (_, stage), record, attempt in zip(job, records, attempts, strict=True):
            attempt.error = None if stage.files.result.exists() else error
            attempt.ended = now()
            if read_owner(stage.files) == owner:
                write_record(stage.files, record)
                give_back(stage.files, owner)


def _take_over(rows: Sequence[Row], job: Sequence[tuple[Node, Stage]]) -> list[Record]:
    """Makes this process the owner of the run directories, and writes what a start needs to them."""
    first = job[0][1]
    with locked(Path(first.execution.runs)):
        records = [_new_record(node, stage, str(first.directory / LOGS)) for node, stage in job]
        for (node, stage), record in zip(job, records, strict=True):
            take(stage.files, _owner_of(records[0].attempts[-1]), is_gone)
            write_record(stage.files, record)
            write_text(stage.files.stage, stage.to_yaml())
            note_rows(rows, [node], Path(stage.execution.runs))
    return records


def _owner_of(attempt: Attempt) -> Owner:
    return Owner(attempt.job_id, 0, attempt.host, attempt.started)


def start_logs(record: Record, processes: int) -> None:
    """Writes the first line of each rank's log, as a job does (launch.logs.HEADER)."""
    Path(record.folder).mkdir(exist_ok=True)
    for rank in range(processes):
        with open(record.log(rank), "a") as handle:
            handle.write(f"=== job {record.job_id}, rank {rank} on {hostname()}, {now()}\n")


def _new_record(node: Node, stage: Stage, folder: str) -> Record:
    """The record of this run for launch/status.py; refused while another run of the stage is active."""
    refuse_active(stage.files)
    attempt = Attempt(f"local-{os.getpid()}", hostname(), now(), 0)
    return Record(attempt.job_id, folder, now(), 1, list(node.rows), node.stage_parents, [attempt])


def stage_command(*stages: Stage) -> list[str]:
    """The command of each process of a stage, or of several that share their teachers."""
    return [sys.executable, "-m", "mvd.run", *(str(stage.files.stage) for stage in stages)]


def generate_data(stage: Stage) -> None:
    """Writes the generated data set that a stage uses, if it does not exist yet."""
    data = stage.execution.data
    if data is None or not dataset_of(stage.recipe).generated or (Path(data.root) / data.test).exists():
        return
    if run_processes([sys.executable, "-m", "mvd.data.synthetic_motion", data.root], 1, environment(1)):
        raise ConfigError(
            f"the {stage.recipe.dataset} data set could not be written to {data.root}; see the messages above"
        )


def environment(processes: int) -> dict[str, str]:
    """Environment variables of processes that share this machine's cores."""
    python_path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    expected = {"MVD_EXPECT_GPU": "1"} if count_gpus() else {}
    return {"PYTHONPATH": python_path, "OMP_NUM_THREADS": str(max(1, CORES // processes)), **expected}


def print_results(request: Request, stages: Sequence[Stage], ran_together: Sequence[Sequence[Stage]] = ()) -> None:
    """Prints the table of stages, what sharing teachers saved, the accuracy of each row, and the next commands."""
    results = [stage.files.read_result() or {} for stage in stages]
    lines = [
        [stage.id, f"{result['wall_seconds']:,.0f} s", result_text(result)]
        for stage, result in zip(stages, results, strict=True)
    ]
    print()
    print_table("stages", ["stage", "wall time>", "result"], lines)
    for members in ran_together:
        print(sharing_text(members))
    print()
    for stage, result in zip(stages, results, strict=True):
        if stage.kind == "test":
            print(f"{stage.id}: {test_summary(stage, result)}")
    print_report(row_results(request))
    print_next(
        [
            ("see the curves", tensorboard(request.cluster.runs)),
            ("print the accuracies again", command("report.py", *request.words)),
        ]
    )


def sharing_text(members: Sequence[Stage]) -> str:
    """What students saved by sharing one pass of their teachers."""
    recipes = [stage.recipe for stage in members]
    alone, saved = sum(map(total_tflop, recipes)), saved_tflop(recipes)
    names = " and ".join(stage.id for stage in members)
    return (
        f"{names} ran together with one pass of their teachers (each wall time is from the start of the job); that "
        f"saved {100 * saved / alone:.0f} % of the operations of training one after the other (counted, not timed)"
    )


def test_summary(stage: Stage, result: dict[str, Any]) -> str:
    """The interval of a test and its most confused classes, in one line."""
    from mvd.evaluation.predictions import read_predictions  # imports torch
    from mvd.evaluation.statistics import confused_pairs

    interval = f"95 % interval of top-1 {interval_text(result)} %" if "top1_interval" in result else "no interval"
    try:
        found = read_predictions(stage)
    except ConfigError as error:
        return f"{interval}; {error}"
    pairs = confused_pairs(found.matrix, MOST_PAIRS)
    confused = ", ".join(
        f"{found.names[pair.label]} as {found.names[pair.predicted]} {pair.videos} x" for pair in pairs
    )
    return f"{interval}; most confused: {confused or 'none'}"
