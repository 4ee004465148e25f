"""Small real runs: stages of a dozen updates, and several processes to run them in."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.local.processes import run_processes
from mvd.config import Mixing, Optimization
from mvd.config.run_settings import DatasetPaths
from mvd.files import write_text
from mvd.stage import Execution, Stage
from tests.data.stages import PLAIN, recipe

OPTIMIZATION = {field.name for field in dataclasses.fields(Optimization)}
UPDATES = 12  # two epochs of the 48 training videos in batches of 8


class Finished(NamedTuple):
    """The result of several processes: the first exit code that is not 0, or 0, and the output of each rank."""

    code: int
    output: list[str]


def run(command: list[str], count: int, folder: Path, **environment: str) -> Finished:
    """Runs a command as `count` processes that train together, each of which prints to a file of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    redirected = ["sh", "-c", 'exec "$@" >"$OUTPUT.$RANK" 2>&1', "sh", *command]
    variables = {"OUTPUT": str(folder / "output"), "OMP_NUM_THREADS": "1", **environment}
    code = run_processes(redirected, count, variables)
    return Finished(code, [(folder / f"output.{rank}").read_text() for rank in range(count)])


def call(function: Callable[[Path], None], folder: Path, count: int = 2) -> Finished:
    """Calls a test module's function in `count` processes, with `folder` as its argument."""
    return run([sys.executable, "-m", "tests.runs", function.__module__, function.__name__, str(folder)], count, folder)


def succeed(function: Callable[[Path], None], folder: Path, count: int = 2) -> list[str]:
    """As `call`, but fails if a process fails; returns the output of each rank."""
    finished = call(function, folder, count)
    assert finished.code == 0, "\n".join(finished.output)
    return finished.output


def run_cli(stage: Stage, count: int, **environment: str) -> Finished:
    """`python -m mvd.run` of the stage's stage.yaml."""
    path = write_stage(stage)
    return run([sys.executable, "-m", "mvd.run", str(path)], count, stage.directory / "printed", **environment)


def write_stage(stage: Stage) -> Path:
    stage.directory.mkdir(parents=True, exist_ok=True)
    path = stage.directory / "stage.yaml"
    write_text(path, stage.to_yaml())
    return path


def small_stage(
    kind: str, name: str, runs: Path, data: Path | DatasetPaths, inputs: dict[str, str] | None = None, **fields: Any
) -> Stage:
    """A stage of 12 updates, each of 2 micro-batches of 2 samples on 2 processes; fields of recipe or execution."""
    known = {field.name for field in dataclasses.fields(Execution)}
    how = {key: fields.pop(key) for key in list(fields) if key in known}
    optimization = {key: fields.pop(key) for key in list(fields) if key in OPTIMIZATION}
    settings = Optimization(
        **{
            "global_batch": 8,
            "epochs": 2,
            "schedule_epochs": 3,
            "warmup_epochs": 0.5,
            "base_lr": 0.016,
            "min_lr": 1e-4,
            "betas": (0.9, 0.95),
            "micro_batch": 4,
            **optimization,
        }
    )
    if kind == "finetune":
        fields = {"mixing": Mixing(group=4), "augmentation": dataclasses.replace(PLAIN, samples=1), **fields}
    if kind == "pretrain":
        fields = {"drop_path": 0.0, **fields}
    execution = {
        "world_size": 2,
        "micro_batch": 2,
        "accumulation": 2,
        "precision": "fp32",
        "runs": str(runs),
        "data": data if isinstance(data, DatasetPaths) else DatasetPaths(root=str(data)),
        "workers": 0,
        "checkpoint_every": 6,
        "validate_every": 1,
        "probe_every": 0,
        "log_every": 1,
    }
    return Stage(
        kind=kind,
        id=name,
        recipe=recipe(kind, optimization=settings, **fields),
        inputs=inputs or {},
        execution=Execution(**{**execution, **how}),
    )


def again(stage: Stage, runs: Path, **execution: Any) -> Stage:
    """A copy of a finished run in another folder, as if it had been killed before it wrote its result."""
    shutil.copytree(stage.directory, runs / stage.id)
    copy = dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, runs=str(runs), **execution))
    for name in ("result.json", "weights.safetensors"):
        (copy.directory / name).unlink(missing_ok=True)
    write_stage(copy)
    return copy


def events(stage: Stage) -> dict[str, list[int]]:
    """TensorBoard's tags, and the updates of their points."""
    accumulator = EventAccumulator(str(stage.directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [point.step for point in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def read_metrics(stage: Stage) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage.directory / "metrics.jsonl").read_text().splitlines()]


def curve(stage: Stage, name: str) -> list[float]:
    """The values of a metric, by update."""
    return [record[name] for record in read_metrics(stage) if name in record]


def numbers(stage: Stage) -> list[tuple]:
    """The metrics of each update that do not depend on the machine."""
    names = ("update", "epoch", "loss", "grad_norm", "lr", "val_top1")
    return [tuple(record.get(name) for name in names) for record in read_metrics(stage)]


def read_result(stage: Stage) -> dict[str, Any]:
    return json.loads((stage.directory / "result.json").read_text())


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs between two runs of the same stage."""
    return {key: value for key, value in result.items() if key not in ("wall_seconds", "provenance")}


if __name__ == "__main__":
    import importlib

    import torch.distributed as dist

    module, name, folder = sys.argv[1:]
    getattr(importlib.import_module(module), name)(Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()
