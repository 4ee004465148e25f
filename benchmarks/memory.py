"""Memory of the loader's processes over thousands of videos: `python -m benchmarks.memory`.

The loader of the first row's fine-tuning as in training: real-size videos, a list as long as Kinetics-400's, batches of
12 videos with two augmented copies each. USS is the memory of a process alone; PSS adds its share of the memory in
common with the training process, from which it was forked.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.clips import write_clips
from experiments import k400
from mvd.config import DATASETS, Finetune
from mvd.data.annotations import Entry
from mvd.data.datasets import FinetuneDataset
from mvd.data.loader import train_loader
from mvd.stage import Execution, Stage

RECIPE: Finetune = k400.rows[0].finetune
STRETCHES = 8


def as_listed(paths: list[Path]) -> list[Entry]:
    """A training list of Kinetics-400's length with a few files, each line with its own string object."""
    names = [(str(path.parent), path.name) for path in paths]
    facts = DATASETS["k400"]
    lines = (names[number % len(names)] for number in range(facts.train_samples))
    return [Entry("/".join(name), number % facts.classes) for number, name in enumerate(lines)]


def worker_memory(paths: list[Path], videos: int, workers: int) -> Iterator[list[tuple[float, float]]]:
    """Reads so many videos; yields each worker's USS and PSS after each batch, in MB."""
    batch = RECIPE.optimization.micro_batch
    accumulation = RECIPE.optimization.global_batch // batch
    execution = Execution(micro_batch=batch, accumulation=accumulation, workers=workers)
    stage = Stage(kind="finetune", id="memory", recipe=RECIPE, execution=execution)
    loader = train_loader(stage, FinetuneDataset(RECIPE, as_listed(paths), "pyav"), rank=0)
    others = set(psutil.Process().children())
    batches = iter(loader)
    processes = [child for child in psutil.Process().children() if child not in others]
    for _ in range(0, videos, batch):
        next(batches)
        memory = [process.memory_full_info() for process in processes]
        yield [(one.uss / 1e6, one.pss / 1e6) for one in memory]


def memory_table(paths: list[Path], videos: int, workers: int = 2) -> Table:
    """Medians over each eighth of the videos, and the lowest and highest USS."""
    heads = (f"worker {number}: {what}" for number in range(workers) for what in ("own MB", "with share"))
    table = Table("videos", *heads)
    readings, batch = list(worker_memory(paths, videos, workers)), RECIPE.optimization.micro_batch
    length = math.ceil(len(readings) / STRETCHES)
    for start in range(0, len(readings), length):
        stretch = readings[start : start + length]
        cells = []
        for one in zip(*stretch, strict=True):
            own, share = zip(*one, strict=True)
            cells.append(f"{statistics.median(own):.0f} ({min(own):.0f} - {max(own):.0f})")
            cells.append(f"{statistics.median(share):.0f}")
        table.add_row(f"{start * batch:,} - {(start + len(stretch)) * batch:,}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2400, help="to read (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--folder", default="data/benchmark", help="where the videos are written (%(default)s)")
    arguments = parser.parse_args()
    clips = write_clips(Path(arguments.folder))
    console = Console(width=120)
    console.print(memory_table([*clips["340x256"], *clips["568x320"]], arguments.videos, arguments.workers))


if __name__ == "__main__":
    main()
