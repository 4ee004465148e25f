"""Compares loading with the straightforward pipeline of plain_loading.py: `make bench-data`.

CPU time per sample of one process with one thread, from a path to the tensor that is sent to the device. A round uses
one video and one seed and times the baseline and ours in turn, each in a process of its own, ours in one that is set
up like a loader worker; the table has the median and quartiles of the ratios. Ours ends with uint8: normalising,
erasing and cutting test views happen on the device and are excluded. Then the memory of the loader's processes over
2,000 videos is printed (memory.py), and the number of cores per GPU that loading needs in each row.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import plain_loading
from benchmarks.clips import write_clips
from benchmarks.memory import memory_table
from experiments import k400, ssv2
from mvd.config import Pretrain, Row
from mvd.config.sizes import SIZES
from mvd.data.annotations import Entry
from mvd.data.datasets import FinetuneDataset, MaskedClipDataset, SampleKey, TrainDataset
from mvd.data.loader import start_worker
from mvd.data.video.reader import open_video
from mvd.data.views import ViewDataset, Views
from mvd.flops import tflop_per_sample

K400, SSV2 = k400.rows[0], ssv2.rows[0]
VIDEOS_FOR_MEMORY = 2000


@dataclass(frozen=True)
class Task:
    """A kind of sample from videos of one size, with the minimum ratio and the ratio aimed at.

    baseline and ours read and prepare one sample of a video; clips: those that come out of one sample.
    """

    name: str
    size: str
    least: float
    aim: float
    baseline: Callable[[str, int], Any]
    ours: Callable[[str, int], Any]
    clips: int = 1


def tasks() -> list[Task]:
    """The rows of the table."""

    def finetune(row: Row) -> dict[str, Any]:
        recipe = row.finetune
        return {
            "baseline": lambda path, seed: plain_loading.finetune(
                path, seed, recipe.sampling, recipe.augmentation.flip
            ),
            "ours": lambda path, seed: load(FinetuneDataset(recipe, [Entry(path, 0)], "pyav"), seed),
            "clips": 2,
        }

    def test(row: Row) -> dict[str, Any]:
        recipe = row.test
        views = Views(recipe.sampling, recipe.clips, recipe.crops)
        return {
            "baseline": lambda path, seed: plain_loading.test_views(path, recipe.sampling, recipe.clips),
            "ours": lambda path, seed: load_views(ViewDataset([Entry(path, 0)], views)),
            "clips": recipe.clips * recipe.crops,
        }

    pretrain = {"baseline": plain_loading.pretrain, "ours": lambda path, seed: load(masked_clips(path), seed)}
    return [
        Task("pre-training clip", "340x256", 3, 5, **pretrain),
        Task("pre-training clip", "568x320", 2.7, 4, **pretrain),
        Task("fine-tuning, K400, 2 views", "340x256", 3.5, 6, **finetune(K400)),
        Task("fine-tuning, K400, 2 views", "568x320", 3.5, 6, **finetune(K400)),
        Task("test, K400, 15 views", "340x256", 18, 25, **test(K400)),
        Task("test, K400, 15 views", "568x320", 18, 25, **test(K400)),
        Task("fine-tuning, SSv2, 2 views", "426x240", 4.5, 7, **finetune(SSV2)),
        Task("fine-tuning, SSv2, 2 views", "426x240 VP9", 4.5, 7, **finetune(SSV2)),
        Task("test, SSv2, 6 views", "426x240", 8, 10, **test(SSV2)),
        Task("test, SSv2, 6 views", "426x240 VP9", 8, 10, **test(SSV2)),
    ]


def masked_clips(path: str) -> MaskedClipDataset:
    """The pre-training data set of the first row, with one video."""
    recipe: Pretrain = K400.pretrain
    clip = SIZES[recipe.student].clip
    return MaskedClipDataset(recipe, clip, SIZES[recipe.teacher].image.image_size, [Entry(path, 0)], "pyav")


def load(dataset: TrainDataset, seed: int) -> dict[str, Any]:
    return dataset.collate([dataset[SampleKey(seed, 0)]])


def load_views(dataset: ViewDataset) -> dict[str, Any]:
    return dataset.collate([dataset[0]])


class TimedReading:
    """Sums the CPU time in the reader; replaces `open_video` of the data sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def open_video(self, path: str, reader: str = "pyav") -> "TimedReading":
        self.video, self.seconds = timed(lambda: open_video(path, reader))
        return self

    def __len__(self) -> int:
        return len(self.video)

    def frames(self, indices: Any) -> Any:
        frames, seconds = timed(lambda: self.video.frames(indices))
        self.seconds += seconds
        return frames


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and the CPU seconds of this process for it."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


@dataclass(frozen=True)
class Round:
    """CPU seconds per sample; reading: the part of ours that is spent in the reader."""

    baseline: float
    ours: float
    reading: float


def time_baseline(task: int, path: str, seed: int) -> float:
    """CPU seconds of the baseline for a sample of this task."""
    return timed(lambda: tasks()[task].baseline(path, seed))[1]


def time_ours(task: int, path: str, seed: int) -> tuple[float, float]:
    """CPU seconds of ours for a sample of this task, and the part of them in the reader."""
    reading = TimedReading()
    sys.modules["mvd.data.datasets"].open_video = reading.open_video  # type: ignore[attr-defined]
    sys.modules["mvd.data.views"].open_video = reading.open_video  # type: ignore[attr-defined]
    return timed(lambda: tasks()[task].ours(path, seed))[1], reading.seconds


def measure(task: int, paths: list[str], rounds: int) -> list[Round]:
    """Rounds over all videos in turn, after a warm-up round of each."""
    measured = []
    fork = get_context("fork")
    with (
        ProcessPoolExecutor(1, fork) as plain,
        ProcessPoolExecutor(1, fork, initializer=start_worker, initargs=(0,)) as worker,
    ):
        for number in range(-1, rounds):
            for path in paths:
                baseline = plain.submit(time_baseline, task, path, number + 1).result()
                ours = worker.submit(time_ours, task, path, number + 1).result()
                if number >= 0:
                    measured.append(Round(baseline, *ours))
    return measured


def summary(task: Task, measured: list[Round]) -> list[str]:
    """The table's row of a task."""
    ratios = [one.baseline / one.ours for one in measured]
    low, _, high = statistics.quantiles(ratios, n=4)
    ours = statistics.median(one.ours for one in measured)
    share = statistics.median(one.reading / one.ours for one in measured)
    return [
        task.name,
        task.size,
        f"{1000 * statistics.median(one.baseline for one in measured):.0f}",
        f"{1000 * ours:.1f}",
        f"{statistics.median(ratios):.1f}x",
        f"{low:.1f} - {high:.1f}",
        f"{task.least}x / {task.aim}x",
        f"{100 * share:.0f} %",
        f"{task.clips / ours:.0f}",
    ]


def cores_per_gpu(clips_per_second: dict[str, float], tflops: tuple[float, ...]) -> Table:
    """Cores needed to feed a GPU that sustains so many TFLOP/s, by stage."""
    table = Table("stage", "clips/s a core", *(f"cores at {value:.0f} TFLOP/s" for value in tflops))
    seen = set()
    for row in (*k400.rows, *ssv2.rows):
        for stage, task in (("pretrain", "pre-training clip"), ("finetune", "fine-tuning"), ("test", "test")):
            recipe = getattr(row, stage)
            name = f"{stage} {recipe.name if stage == 'pretrain' else row.name}"
            if name in seen:
                continue
            seen.add(name)
            key = next(k for k in clips_per_second if k.startswith(task) and (stage == "pretrain" or _set(row) in k))
            views = recipe.clips * recipe.crops if stage == "test" else 1
            needed = [value / (tflop_per_sample(recipe) / views) / clips_per_second[key] for value in tflops]
            table.add_row(name, f"{clips_per_second[key]:.0f}", *(f"{cores:.1f}" for cores in needed))
    return table


def _set(row: Row) -> str:
    return "K400" if row.finetune.dataset == "k400" else "SSv2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds over each task's videos (default: %(default)s)")
    parser.add_argument("--folder", default="data/benchmark", help="where the videos are written (%(default)s)")
    parser.add_argument("--only", default="", help="only tasks whose name or size contains this")
    parser.add_argument(
        "--tflops", type=float, nargs="+", default=[100.0, 200.0, 400.0], help="of a GPU (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    clips = {size: [str(path) for path in paths] for size, paths in write_clips(Path(arguments.folder)).items()}
    heads = ["task", "videos", "baseline ms", "ours ms", "ratio", "quartiles", "at least / aim"]
    heads += ["decode share", "clips/s a core"]
    table, rates = Table(*heads), {}
    for number, task in enumerate(tasks()):
        if arguments.only in f"{task.name} {task.size}":
            measured = measure(number, clips[task.size], arguments.rounds)
            row = summary(task, measured)
            table.add_row(*row)
            rates[f"{task.name} {task.size}"] = task.clips / statistics.median(one.ours for one in measured)
            print(f"{len(measured)} rounds: {' | '.join(row)}", file=sys.stderr, flush=True)
    console = Console(width=130)
    console.print(f"CPU milliseconds per sample on one core; {os.cpu_count()} cores, torch {torch.__version__}", table)
    if not arguments.only:
        files = [Path(path) for path in clips["340x256"] + clips["568x320"]]
        console.print("memory of the loader's processes", memory_table(files, VIDEOS_FOR_MEMORY))
        console.print("cores that loading takes for one GPU", cores_per_gpu(rates, tuple(arguments.tflops)))


if __name__ == "__main__":
    main()
