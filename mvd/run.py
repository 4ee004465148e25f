"""Runs one stage: `python -m mvd.run <run directory>/stage.yaml`, once a process, as torchrun or a SLURM task does.

Example, on a node with 8 GPUs:
    torchrun --standalone --nproc-per-node 8 -m mvd.run runs/pretrain-vitb_from_vitb_e400-1a2b3c4d/stage.yaml
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch.distributed as dist

from mvd.accuracy import run_test
from mvd.batch import solve_batch
from mvd.config import ConfigError
from mvd.files import write_json
from mvd.provenance import record_attempt
from mvd.stage import Stage
from mvd.train.engine import Process, agreeing, start_processes
from mvd.train.loop import NonFiniteLoss, train


def run_stage(stage: Stage) -> dict[str, Any]:
    """Trains or tests a stage in its run directory and returns its result; one that is complete is only read.

    Every process of the stage calls it, with the environment variables that torchrun sets.

    Raises:
        ConfigError: something the user gave cannot work; on one process, the others raise SystemExit.
        NonFiniteLoss: training diverged; on every process.
    """
    path = stage.directory / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    process = start_processes()
    with agreeing():
        stage = fit_to_processes(stage, process)
        if process.is_first:
            stage.directory.mkdir(parents=True, exist_ok=True)
            attempt = record_attempt(stage, process.world_size)
            print(f"{stage.id}: attempt {attempt}, {process.world_size} x {process.device.type}", flush=True)
    body = run_test(stage, process) if stage.kind == "test" else train(stage, process)
    results = [{"stage": stage.id, "kind": stage.kind, "complete": True, **body}]
    if process.is_first:
        write_json(path, results[0])
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
    try:
        run_stage(Stage.from_yaml(arguments.stage))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except NonFiniteLoss as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
