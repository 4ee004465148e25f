"""Times students that share one pass of their teachers against the same students one after the other, at real size.

python -m benchmarks.together [FROM ...] [--updates N] [--clips N]

FROM: the size of the teachers, of which S and B learn: base, large, or both if left out. On the CPU in fp32, with the
loader's reading of H.264 videos counted. An update alone and an update in company alternate in one process and read
from one loader, so that what else the machine does falls on both. The ratio of the
CPU times does not depend on that.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.clips import write_clips
from benchmarks.real_size import random_teachers, with_batch
from experiments.recipes import VITB_FROM_VITB, VITB_FROM_VITL, VITS_FROM_VITB, VITS_FROM_VITL
from mvd.config import DatasetPaths, Pretrain
from mvd.distributed.process import Process, start_processes
from mvd.monitoring.metrics import peak_memory_gb
from mvd.stage import Execution, Stage
from mvd.train.group import Group, Member

STUDENTS = {"base": (VITS_FROM_VITB, VITB_FROM_VITB), "large": (VITS_FROM_VITL, VITB_FROM_VITL)}
FILES = 8  # videos, each read several times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="FROM", help=", ".join(STUDENTS))
    parser.add_argument("--updates", type=int, default=2, help="that are timed of each kind, after one that is not")
    parser.add_argument("--clips", type=int, default=1, help="of an update")
    arguments = parser.parse_args()
    if unknown := set(arguments.sizes) - STUDENTS.keys():
        parser.error(f"FROM must be one of {', '.join(STUDENTS)}, got {', '.join(sorted(unknown))}")
    process = start_processes()
    print(f"{'students':24} {'one after the other':>20} {'together':>10} {'faster':>8} {'CPU time':>9} {'memory':>9}")
    for size in arguments.sizes or STUDENTS:
        with tempfile.TemporaryDirectory() as folder:
            alone, together = compare(size, arguments.clips, arguments.updates, Path(folder), process)
            ratio, ratio_of_work = (before / after for before, after in zip(alone, together, strict=True))
        students = " and ".join(recipe.student for recipe in STUDENTS[size])
        figures = f"{alone[0]:18.1f} s {together[0]:8.1f} s {ratio:7.2f}x {ratio_of_work:8.2f}x"
        print(f"{f'{students} from {size}':24} {figures} {peak_memory_gb(process.device):6.1f} GB", flush=True)
        gc.collect()
    return 0


class Times(NamedTuple):
    """Seconds on the clock, and of all the process's cores together."""

    wall: float
    cpu: float


def compare(size: str, clips: int, updates: int, folder: Path, process: Process) -> tuple[Times, Times]:
    """Median times of one update of both students, one after the other and together."""
    videos = write_list(folder)
    teachers = random_teachers(size, folder)
    stages = [_stage(recipe, clips, videos, teachers, folder) for recipe in STUDENTS[size]]
    group = Group(stages, process, lambda stage, result: None)
    try:
        for member in group.members:
            group.start(member)
        group.start_loader(0)
        alone, together = [], []
        for number in range(updates + 1):
            alone.append(_times(lambda: [_update_alone(member) for member in group.members]))
            together.append(_times(lambda: group.one_unit(group.members)))
            print(f"  {number}: {alone[-1]}, {together[-1]}", file=sys.stderr)
    finally:
        group.close()
    return _median(alone[1:]), _median(together[1:])


def _median(times: list[Times]) -> Times:
    return Times(*(statistics.median(values) for values in zip(*times, strict=True)))


def _update_alone(member: Member) -> None:
    """An update as a run of its own makes it, with its own pass of the teachers."""
    run = member.training
    learning_rate = float(run.learning_rates[run.update])
    run._one_update(learning_rate)
    run.complete_update(learning_rate)


def _times(work: Callable[[], object]) -> Times:
    started = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - started[0], time.process_time() - started[1])


def write_list(folder: Path) -> DatasetPaths:
    """A training list of Kinetics-sized videos."""
    clips = write_clips(folder / "clips")["340x256"]
    lines = []
    for number in range(FILES):
        link = folder / f"{number}.mp4"
        link.symlink_to(clips[number % len(clips)])
        lines.append(f"{link} {number}\n")
    (folder / "train.csv").write_text("".join(lines))
    return DatasetPaths(root=str(folder))


def _stage(recipe: Pretrain, clips: int, data: DatasetPaths, teachers: dict[str, str], folder: Path) -> Stage:
    made = with_batch(recipe, clips)
    settings = dataclasses.replace(made.optimization, epochs=1000)
    return Stage(
        kind="pretrain",
        id=recipe.name,
        recipe=dataclasses.replace(made, optimization=settings),
        inputs=teachers,
        execution=Execution(
            micro_batch=clips,
            deepspeed="zero0",
            precision="fp32",
            runs=str(folder / "runs"),
            data=data,
            workers=0,
            checkpoint_minutes=None,
            probe_every=0,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
