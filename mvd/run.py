"""Runs one stage: `python -m mvd.run <run directory>/stage.yaml`, once per process, as torchrun or a SLURM task does.

Several pre-trainings whose students share one pass of their teachers are given together, one stage.yaml each.

Example, on a node with 8 GPUs:
    torchrun --standalone --nproc-per-node 8 -m mvd.run runs/pretrain-vitb_from_vitb_e400-1a2b3c4d/stage.yaml

SIGUSR2, SIGTERM or Ctrl-C: saves a checkpoint after the current update and exits; a second SIGTERM or Ctrl-C ends it at
once. SIGUSR1: saves a checkpoint and continues. Exit codes: 0 complete, 2 it cannot continue (one sentence says why),
75 stopped by a signal, 76 a process or a host was lost (start it again).
"""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from mvd.batch import Batch, solve_batch, solve_shared
from mvd.config import ConfigError
from mvd.data.class_names import class_names_of
from mvd.distributed.exit_codes import INVALID, OK, RETRYABLE, STOPPED, leave
from mvd.distributed.explain import explain_errors
from mvd.distributed.faults import HostFault, PeerLost, RunFailed
from mvd.distributed.ownership import check_owner
from mvd.distributed.process import Process, exit_together, start_processes
from mvd.distributed.signals import Interrupted, signal_handlers
from mvd.distributed.watchdog import Watchdog
from mvd.evaluation.multiview import merge_shards, run_test
from mvd.files import DISK_FAULTS
from mvd.provenance import earlier_seconds, record_attempt, result_facts
from mvd.rehearsal import rehearse
from mvd.sharing import smallest_batch
from mvd.stage import Stage
from mvd.train.group import train_together
from mvd.train.loop import train

logger = logging.getLogger("mvd.run")  # not __name__, which is __main__ in the command


def run_stage(stage: Stage) -> dict[str, Any]:
    """Trains or tests a stage in its run directory and returns its result; a complete stage's result is only read.

    Of a test in shards, this is the result of one shard; the last shard to finish writes the result of the whole test.
    Call it in every process of the stage, in the main thread, with the environment variables that torchrun sets. It
    handles SIGUSR1, SIGUSR2, SIGTERM and SIGINT until it returns.

    Raises:
        ConfigError: an invalid setting or input; on one process, the others raise SystemExit.
        RunFailed: training diverged, or its data is gone; on every process.
        HostFault, PeerLost: a host or a process is lost or unusable: start again; on every process that is left.
        Interrupted: a signal asked it to stop, and everything is saved; on every process.
    """
    result = stage.job_files.read_result()
    if result is None:
        limits = stage.execution.faults
        with signal_handlers(), explain_errors(stage):
            process = start_processes(stage.files, limits)
            with Watchdog(stage.files, process, limits.hang_minutes):
                with exit_together():
                    fitted = fit_to_processes(stage, process)
                with explain_errors(fitted):
                    result = _run_to_the_end(fitted, process)
    if stage.execution.shards > 1:
        merge_shards(stage)
    return result


def run_group(stages: Sequence[Stage], left: Callable[[Stage, str | None], object] | None = None) -> None:
    """Trains several pre-trainings that share their teachers (mvd.train.group); those that are complete are left out.

    Each has its own run directory, to which its result is written as soon as it is complete. Call it as `run_stage`,
    which says what it raises; RunFailed when all students that can be are complete.

    left: is called on the first process when a student is complete, with None, or cannot continue, with the reason.
    """
    stages = [stage for stage in stages if stage.files.read_result() is None]
    if len(stages) < 2:
        for stage in stages:
            run_stage(stage)
        return
    limits = stages[0].execution.faults
    first, *others = (stage.files for stage in stages)
    with signal_handlers(), explain_errors(*stages):
        process = start_processes(first, limits)
        tell = left if left is not None and process.is_first else _tell_nobody
        with Watchdog(first, process, limits.hang_minutes, others):
            with exit_together():
                fitted = fit_group_to_processes(stages, process)
            with explain_errors(*fitted):
                started = [stage for stage in fitted if _has_started(stage, process, tell)]

                def complete(stage: Stage, body: dict[str, Any]) -> None:
                    _write_result(stage, body, process)
                    tell(stage, None)

                if started:
                    train_together(started, process, complete, tell)


def _tell_nobody(_: Stage, __: str | None) -> None:
    """Nobody waits for the students of a group that runs without SLURM."""


def _has_started(stage: Stage, process: Process, failed: Callable[[Stage, str], object]) -> bool:
    """Records the start of a group's student; False if its run directory is another attempt's."""
    try:
        _record_start(stage, process)
    except RunFailed as error:
        failed(stage, str(error))
        return False
    return True


def _run_to_the_end(stage: Stage, process: Process) -> dict[str, Any]:
    _record_start(stage, process)
    if stage.execution.rehearsal is not None:
        body = rehearse(stage, process)
    else:
        body = run_test(stage, process) if stage.kind == "test" else train(stage, process)
    return _write_result(stage, body, process)


def _record_start(stage: Stage, process: Process) -> None:
    check_owner(stage.job_files)
    with exit_together():
        if process.is_first:
            stage.job_directory.mkdir(parents=True, exist_ok=True)
            attempt = record_attempt(stage, process.world_size)
            _write_class_names(stage)
            logger.info("%s: attempt %d, %d x %s", stage.id, attempt, process.world_size, process.device.type)


def _write_result(stage: Stage, body: dict[str, Any], process: Process) -> dict[str, Any]:
    results = [{"stage": stage.id, "kind": stage.kind, "complete": True, **body}]
    check_owner(stage.job_files)
    if process.is_first:
        results[0]["wall_seconds"] += earlier_seconds(stage)
        if stage.execution.shards == 1:
            results[0]["provenance"] = result_facts(stage)
        stage.job_files.write_result(results[0])
    dist.broadcast_object_list(results)
    return results[0]


def _write_class_names(stage: Stage) -> None:
    names = class_names_of(stage.recipe, stage.execution.data) if stage.kind in ("finetune", "test") else None
    if names is not None:
        stage.files.write_class_names(names)


def fit_to_processes(stage: Stage, process: Process) -> Stage:
    """The stage for the actual number of processes: torchrun may start another number than planned."""
    if process.world_size == stage.execution.world_size or stage.kind == "test":
        return stage
    batch = solve_batch(stage.recipe, process.world_size, stage.execution.micro_batch)
    return _with_batch(stage, batch, parts=1)


def fit_group_to_processes(stages: Sequence[Stage], process: Process) -> list[Stage]:
    """As `fit_to_processes`, for students that share their teachers."""
    if all(process.world_size == stage.execution.world_size for stage in stages):
        return list(stages)
    recipes = [stage.recipe for stage in stages]
    batches = solve_shared(recipes, process.world_size, min(stage.execution.micro_batch for stage in stages))
    smallest = smallest_batch(recipes)
    return [
        _with_batch(stage, batch, parts=batch.total // smallest) for stage, batch in zip(stages, batches, strict=True)
    ]


def _with_batch(stage: Stage, batch: Batch, parts: int) -> Stage:
    execution = dataclasses.replace(
        stage.execution,
        world_size=batch.world_size,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        batch_parts=parts,
    )
    return dataclasses.replace(stage, execution=execution)


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        nargs="+",
        metavar="stage",
        help="stage.yaml in a run directory, as the launcher wrote it; several for students that share their teachers",
    )
    arguments = parser.parse_args()
    code = OK
    try:
        stages = [Stage.from_yaml(path) for path in arguments.stages]
        if len(stages) == 1:
            run_stage(stages[0])
        else:
            run_group(stages)
    except (ConfigError, RunFailed) as error:
        if not isinstance(error, RunFailed) or dist.get_rank() == 0:  # RunFailed is raised on every rank
            _print_error(str(error))
        code = INVALID
    except SystemExit:  # another process prints the error
        code = INVALID
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        _print_error(f"{error.filename or 'a file'}: {error.strerror}; fix that and start the stage again")
        code = INVALID
    except (HostFault, PeerLost) as error:
        _print_error(str(error))
        code = RETRYABLE
    except Interrupted as stop:
        logger.info("%s", stop)
        code = STOPPED
    _leave_process_group(code)
    return code


def _leave_process_group(code: int) -> None:
    """Ends the process group, without which Gloo's threads may abort the interpreter's exit: code 134 instead of ours.

    NCCL may wait for the other processes, which is safe only if no error came to this process alone.
    """
    if dist.is_initialized() and (code in (OK, STOPPED) or dist.get_backend() == "gloo"):
        dist.destroy_process_group()


def _print_error(message: str) -> None:
    """Prints the command's last word, which stays plain: one sentence for a person."""
    with contextlib.suppress(OSError):  # the log may be on the disk that is full; the exit code must still tell
        print(f"error: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    leave(main())
