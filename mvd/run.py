"""Runs one stage: `python -m mvd.run <run directory>/stage.yaml`, once a process, as torchrun or a SLURM task does.

Example, on a node with 8 GPUs:
    torchrun --standalone --nproc-per-node 8 -m mvd.run runs/pretrain-vitb_from_vitb_e400-1a2b3c4d/stage.yaml

SIGUSR2, SIGTERM or Ctrl-C: it saves a checkpoint after the update in progress and leaves; a second SIGTERM or Ctrl-C
ends it at once. SIGUSR1: it saves a checkpoint and goes on. Exit codes: 0 complete, 2 it cannot go on as it is (one
sentence says why), 75 stopped by a signal, 76 a process or a machine was lost (start it again).
"""

import argparse
import dataclasses
import errno
import logging
import sys
from typing import Any

import torch.distributed as dist

from mvd.batch import solve_batch
from mvd.config import ConfigError
from mvd.distributed.exit_codes import RETRYABLE, STOPPED
from mvd.distributed.faults import RunFailed
from mvd.distributed.ownership import check_owner
from mvd.distributed.preflight import HostFault
from mvd.distributed.process import PeerLost, Process, exit_together, raise_peer_lost, start_processes
from mvd.distributed.signals import Interrupted, signal_handlers
from mvd.distributed.watchdog import Watchdog
from mvd.evaluation.multiview import merge_shards, run_test
from mvd.provenance import earlier_seconds, record_attempt
from mvd.stage import Stage
from mvd.train.loop import train

logger = logging.getLogger(__name__)

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


def run_stage(stage: Stage) -> dict[str, Any]:
    """Trains or tests a stage in its run directory and returns its result; one that is complete is only read.

    Of a test that is split, this is the result of one shard; the last shard to end writes that of the whole.

    Every process of the stage calls it from its main thread, with the environment variables that torchrun sets.
    Until it returns, SIGUSR2, SIGTERM and SIGINT are its own.

    Raises:
        ConfigError: something the user gave cannot work; on one process, the others raise SystemExit.
        RunFailed: training diverged, or what it needs is gone; on every process.
        HostFault, PeerLost: a machine or a process is gone or unfit: start it again; on every process that is left.
        Interrupted: a signal asked it to stop, and what was done is saved; on every process.
    """
    result = stage.job_files.read_result()
    if result is None:
        with signal_handlers():
            process = start_processes()
            with Watchdog(stage.files, process, stage.execution.faults.hang_minutes), raise_peer_lost():
                result = _run_to_the_end(stage, process)
    if stage.execution.shards > 1:
        merge_shards(stage)
    return result


def _run_to_the_end(stage: Stage, process: Process) -> dict[str, Any]:
    check_owner(stage.job_files)
    with exit_together():
        stage = fit_to_processes(stage, process)
        if process.is_first:
            stage.job_directory.mkdir(parents=True, exist_ok=True)
            attempt = record_attempt(stage, process.world_size)
            logger.info("%s: attempt %d, %d x %s", stage.id, attempt, process.world_size, process.device.type)
    body = run_test(stage, process) if stage.kind == "test" else train(stage, process)
    results = [{"stage": stage.id, "kind": stage.kind, "complete": True, **body}]
    check_owner(stage.job_files)
    if process.is_first:
        results[0]["wall_seconds"] += earlier_seconds(stage)
        stage.job_files.write_result(results[0])
    dist.broadcast_object_list(results)
    return results[0]


def fit_to_processes(stage: Stage, process: Process) -> Stage:
    """The stage for the processes that are really there: torchrun may start other numbers than were planned."""
    if process.world_size == stage.execution.world_size or stage.kind == "test":
        return stage
    batch = solve_batch(stage.recipe, process.world_size, stage.execution.micro_batch)
    execution = dataclasses.replace(
        stage.execution,
        world_size=batch.world_size,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
    )
    return dataclasses.replace(stage, execution=execution)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="stage.yaml in a run directory, as the launcher wrote it")
    arguments = parser.parse_args()
    code = 0
    try:
        run_stage(Stage.from_yaml(arguments.stage))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; mend that, then start it again", file=sys.stderr)
        return 2
    except RunFailed as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (HostFault, PeerLost) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return RETRYABLE
    except Interrupted as stop:
        if dist.get_rank() == 0:
            print(stop, flush=True)
        code = STOPPED
    if dist.is_initialized():  # not after an error that one process may have met alone: NCCL's may wait for the others
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
