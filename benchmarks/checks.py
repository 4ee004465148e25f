"""What the checks of a run's numbers cost, and how often they are wrong: an undisturbed pre-training with all of them.

    make bench-checks
    python -m benchmarks.checks --updates 2000 --processes 4 --every 20     # the same
    python -m benchmarks.checks --size base --updates 6 --processes 2 --every 2

Compares the weights of all processes, and audits forward passes, after every so many updates. Prints how often they
raised an alarm (never, if all is right), and the share of the time that each takes at the profile's defaults: the
median of its seconds, divided by those of the updates between two of them in the same run. The first ones of each are
left out. Also the times of all processes that each report gathers, which are checked for slow ones.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.real_size import random_teachers, with_batch
from benchmarks.together import write_list
from experiments.demo import rows
from experiments.recipes import VITB_FROM_VITB
from launch.cluster import Cluster
from launch.local.processes import run_processes
from mvd.config import DatasetPaths, Faults
from mvd.data.synthetic_motion import generate_motion
from mvd.files import write_text
from mvd.monitoring.rank_times import RankTimes
from mvd.run import run_stage
from mvd.stage import Execution, Stage
from mvd.train.audit import Audits
from mvd.train.loop import TrainingRun
from mvd.train.replicas import Replicas

SECONDS: dict[str, list[float]] = defaultdict(list)  # what -> of each time
FIRST = 2  # of each kind, which are left out
DEFAULTS = Cluster()
EVERY = {  # what -> updates between two at the profile's defaults
    "times of all processes": DEFAULTS.log_every,
    "comparison of weights": DEFAULTS.faults.compare_every,
    "audit of a forward pass": DEFAULTS.faults.audit_every,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny", help="of the student and its teachers")
    parser.add_argument("--updates", type=int, default=2000, help="at least, with a clip for each process (2000)")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--every", type=int, default=20, help="updates between two checks (20)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return measure(Path(os.environ["STAGE"]))
    with tempfile.TemporaryDirectory() as name:
        path = write_stage(Path(name), arguments.size, arguments.updates, arguments.processes, arguments.every)
        command = [sys.executable, "-m", "benchmarks.checks"]
        return run_processes(command, arguments.processes, {"STAGE": str(path), "OMP_NUM_THREADS": "1"})


def write_stage(folder: Path, size: str, updates: int, processes: int, every: int) -> Path:
    """The stage's file, in a run directory of its own."""
    inputs = random_teachers(size, folder)
    if size == "tiny":
        recipe, data = rows[0].pretrain, DatasetPaths(root=str(generate_motion(folder / "motion", train=48, val=8)))
    else:
        recipe, data = VITB_FROM_VITB, write_list(folder)
    recipe = with_batch(recipe, processes)
    videos = len((Path(data.root) / data.train).read_text().splitlines())
    optimization = dataclasses.replace(recipe.optimization, epochs=-(-updates // (videos // processes)))
    execution = Execution(
        world_size=processes,
        precision="fp32",
        runs=str(folder),
        data=data,
        workers=0,
        probe_every=0,
        checkpoint_minutes=None,
        faults=Faults(compare_every=every, audit_every=every),
        log_every=every,
    )
    stage = Stage(
        kind="pretrain",
        id="checks",
        recipe=dataclasses.replace(recipe, optimization=optimization),
        inputs=inputs,
        execution=execution,
    )
    stage.directory.mkdir()
    path = stage.directory / "stage.yaml"
    write_text(path, stage.to_yaml())
    return path


def measure(path: Path) -> int:
    """Runs the stage as one of its processes; returns 1 if there was an alarm."""
    stage = Stage.from_yaml(path)
    timed(TrainingRun, "_one_update", "update")
    timed(RankTimes, "report", "times of all processes")
    timed(Audits, "_compare", "audit of a forward pass")
    timed(
        Replicas, "compare", "comparison of weights", lambda update: update % stage.execution.faults.compare_every == 0
    )
    result = run_stage(stage)
    if int(os.environ["RANK"]) > 0:
        return 0
    faults = stage.files.read_faults()
    medians = {what: statistics.median(seconds[FIRST:] or seconds) for what, seconds in SECONDS.items()}
    print(f"{result['updates']} updates on {stage.execution.world_size} processes, {medians['update']:.3f} s each")
    for what, every in EVERY.items():
        share = 100 * medians[what] / (every * medians["update"])
        made = f"{len(SECONDS[what])} made, {1000 * medians[what]:.1f} ms"
        print(f"  {what}: {made}; once in {every} updates, {share:.3f} % of the time")
    print(f"  alarms: {len(faults)}", *(fault["message"] for fault in faults), sep="\n    ")
    return int(bool(faults))


def timed(owner: type, name: str, what: str, is_due: Callable[[int], bool] = lambda update: True) -> None:
    """Has a method's calls timed from when all processes are there. is_due: called with its first argument."""
    method = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if not is_due(*arguments[1:2]):
            return method(*arguments, **named)
        dist.barrier()
        started = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            SECONDS[what].append(time.perf_counter() - started)

    setattr(owner, name, call)


if __name__ == "__main__":
    sys.exit(main())
