"""Runs a plan's stages on this machine, one after the other."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cluster import ROOT, Cluster
from launch.plan import is_generated
from launch.processes import STOPPED, run_processes
from launch.report import print_report, read_result, report_line
from launch.request import Request
from launch.screen import command, print_next, print_table, short
from mvd.config import ConfigError
from mvd.files import write_text
from mvd.stage import Stage

CORES = len(os.sched_getaffinity(0))


def this_machine(cluster: Cluster) -> Cluster:
    """The profile cut down to this machine: its GPUs, or else `local_processes` processes on its CPU."""
    gpus = count_gpus()
    processes = gpus or cluster.local_processes
    return dataclasses.replace(
        cluster,
        nodes=1,
        gpus_per_node=processes,
        precision=cluster.precision or ("bf16" if gpus else "fp32"),
        workers=min(cluster.workers, max(1, CORES // processes)),
        image_teacher=dataclasses.replace(cluster.image_teacher, nodes=None),
        video_teacher=dataclasses.replace(cluster.video_teacher, nodes=None),
        pretrain=dataclasses.replace(cluster.pretrain, nodes=None),
        finetune=dataclasses.replace(cluster.finetune, nodes=None),
        test=dataclasses.replace(cluster.test, nodes=None),
    )


def count_gpus() -> int:
    """NVIDIA GPUs that a process started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def run_plan(request: Request, stages: Sequence[Stage]) -> int:
    """Runs the stages that have no result yet, then prints what each took and what the rows reached.

    Returns 0, or 1 where a stage failed, or 130 where the user stopped it; the same command goes on from there.

    Raises:
        ConfigError: a stage's input is missing, or its data could not be generated.
    """
    until = [] if request.options.until == "test" else ["--until", request.options.until]
    again = command("submit.py", *request.words, *until, "--local")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops the stage's processes as Ctrl-C does
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # so does closing the terminal, but not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        for position, stage in enumerate(stages, start=1):
            title = f"[{position}/{len(stages)}] {stage.id}"
            if read_result(stage.directory):
                print(f"{title}: complete already, skipped", flush=True)
                continue
            print(title, flush=True)
            code = run_stage(stage)
            if code == STOPPED:
                raise KeyboardInterrupt
            if code or not read_result(stage.directory):
                print(
                    f"error: {stage.id} ended with exit code {code} and no result; "
                    f"see its messages above and {short(stage.directory)}",
                    file=sys.stderr,
                )
                print_next([("go on from its last checkpoint, once the cause is mended", again)])
                return 1
    except KeyboardInterrupt:
        print("\nstopped")
        print_next([("go on from the last checkpoint", again)])
        return 130
    print_results(request, stages)
    return 0


def run_stage(stage: Stage) -> int:
    """Runs one stage to its end, generating its data first where it needs that; returns the exit code."""
    generate_data(stage)
    for role, path in stage.inputs.items():
        if not Path(path).is_file():
            raise ConfigError(f"{stage.id}: its {role} input {path} does not exist; run that stage again")
    stage.directory.mkdir(parents=True, exist_ok=True)
    write_text(stage.directory / "stage.yaml", stage.to_yaml())
    return run_processes(stage_command(stage), stage.execution.world_size, environment(stage.execution.world_size))


def stage_command(stage: Stage) -> list[str]:
    return [sys.executable, "-m", "mvd.run", str(stage.directory / "stage.yaml")]


def generate_data(stage: Stage) -> None:
    """Writes the generated data set that a stage uses, unless it is there."""
    data = stage.execution.data
    if data is None or not is_generated(stage.recipe.dataset) or (Path(data.root) / data.test).exists():
        return
    if run_processes([sys.executable, "-m", "mvd.data.motion", data.root], 1, environment(1)):
        raise ConfigError(f"the {stage.recipe.dataset} data set could not be written to {data.root}; see above")


def environment(processes: int) -> dict[str, str]:
    """Variables for processes that share this machine's cores."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": python_path, "OMP_NUM_THREADS": str(max(1, CORES // processes))}


def print_results(request: Request, stages: Sequence[Stage]) -> None:
    """The table of stages, the accuracy of each row, and where to look next."""
    results = [read_result(stage.directory) or {} for stage in stages]
    lines = [
        [stage.id, f"{result['wall_seconds']:,.0f} s", result_text(result)]
        for stage, result in zip(stages, results, strict=True)
    ]
    print()
    print_table("stages", ["stage", "wall time>", "result"], lines)
    print()
    print_report([report_line(row, Path(request.cluster.runs)) for row in request.rows])
    print_next(
        [
            ("see the curves", f"tensorboard --logdir {short(request.cluster.runs)}"),
            ("print the accuracies again", command("report.py", *request.words)),
        ]
    )


def result_text(result: dict[str, Any]) -> str:
    """What a stage's result.json says it reached, with the split each accuracy belongs to."""
    if "top1" in result:
        return f"test top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %"
    loss = f"training loss {result['loss']:.4f}" if result.get("loss") is not None else "no loss"
    return f"{loss}, validation top-1 {result['val_top1']:.1f} %" if "val_top1" in result else loss
