"""Compares loading with the straightforward pipeline of plain_loading.py: `make bench-data`.

CPU time per sample, from a path to the tensor in the training process: that of a loader's only worker process, and of
the process that receives its batches. A round reads the same videos with the same seed in turn with the baseline, whose
batches PyTorch's default_collate makes, and with ours; the table has means with standard deviations, and the mean and
standard deviation of the rounds' ratios. Ours ends with uint8: normalising, erasing and cutting test views happen on
the device and are excluded. Prepared copies are read with their packet index, the others without one. Then the memory
of the loader's processes over 2,000 videos is printed (memory.py), and the number of cores per GPU that loading needs
in each row.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks import plain_loading
from benchmarks.clips import write_clips, write_prepared
from benchmarks.memory import memory_table
from experiments import k400, ssv2
from mvd.config import Pretrain, Row
from mvd.config.sizes import SIZES
from mvd.data.annotations import Entry
from mvd.data.datasets import FinetuneDataset, MaskedClipDataset, SampleKey, TrainDataset
from mvd.data.loader import start_worker
from mvd.data.video.packet_index import PacketIndex
from mvd.data.video.reader import open_video
from mvd.data.views import ViewDataset, Views
from mvd.flops import tflop_per_sample

K400, SSV2 = k400.rows[0], ssv2.rows[0]
VIDEOS_FOR_MEMORY = 2000
BATCH = 4  # videos; 1 in testing
READING = get_context("fork").Value("d")  # CPU seconds that our worker has spent in the reader


@dataclass(frozen=True)
class Task:
    """A kind of sample from videos of one size, with the minimum ratio and the ratio aimed at.

    baseline(path, seed) reads one sample; ours makes the data set of these videos; clips: of one sample.
    """

    name: str
    size: str
    least: float
    aim: float
    baseline: Callable[[str, int], Any]
    ours: Callable[[list[Entry]], TrainDataset | ViewDataset]
    clips: int = 1


def tasks() -> list[Task]:
    """The rows of the table."""

    def finetune(row: Row) -> dict[str, Any]:
        recipe = row.finetune
        return {
            "baseline": lambda path, seed: plain_loading.finetune(
                path, seed, recipe.sampling, recipe.augmentation.flip
            ),
            "ours": lambda entries: FinetuneDataset(recipe, entries, "pyav"),
            "clips": 2,
        }

    def test(row: Row) -> dict[str, Any]:
        recipe = row.test
        return {
            "baseline": lambda path, seed: plain_loading.test_views(path, recipe.sampling, recipe.clips),
            "ours": lambda entries: ViewDataset(entries, Views(recipe.sampling, recipe.clips, recipe.crops)),
            "clips": recipe.clips * recipe.crops,
        }

    pretrain = {"baseline": plain_loading.pretrain, "ours": masked_clips}
    return [
        Task("pre-training clip", "340x256", 3, 5, **pretrain),
        Task("pre-training clip", "340x256 prepared", 3, 5, **pretrain),
        Task("pre-training clip", "568x320", 2.7, 4, **pretrain),
        Task("pre-training clip", "568x320 prepared", 2.7, 4, **pretrain),
        Task("fine-tuning, K400, 2 views", "340x256", 3.5, 6, **finetune(K400)),
        Task("fine-tuning, K400, 2 views", "340x256 prepared", 3.5, 6, **finetune(K400)),
        Task("fine-tuning, K400, 2 views", "568x320", 3.5, 6, **finetune(K400)),
        Task("fine-tuning, K400, 2 views", "568x320 prepared", 3.5, 6, **finetune(K400)),
        Task("test, K400, 15 views", "340x256", 18, 25, **test(K400)),
        Task("test, K400, 15 views", "568x320", 18, 25, **test(K400)),
        Task("fine-tuning, SSv2, 2 views", "426x240", 4.5, 7, **finetune(SSV2)),
        Task("fine-tuning, SSv2, 2 views", "426x240 VP9", 4.5, 7, **finetune(SSV2)),
        Task("test, SSv2, 6 views", "426x240", 8, 10, **test(SSV2)),
        Task("test, SSv2, 6 views", "426x240 VP9", 8, 10, **test(SSV2)),
    ]


def masked_clips(entries: list[Entry]) -> MaskedClipDataset:
    """The pre-training data set of the first row, with these videos."""
    recipe: Pretrain = K400.pretrain
    clip = SIZES[recipe.student].clip
    return MaskedClipDataset(recipe, clip, SIZES[recipe.teacher].image.image_size, entries, "pyav")


class PlainDataset(Dataset[Any]):
    """The baseline's samples of these videos."""

    def __init__(self, read: Callable[[str, int], Any], paths: list[str]) -> None:
        self.read, self.paths = read, paths

    def __getitem__(self, key: SampleKey) -> Any:
        return self.read(self.paths[key.index], key.epoch)


class Feed:
    """A loader with one worker process, which reads what it is told to."""

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], set_up: Callable[[int], None]
    ) -> None:
        self._batches: list[list[Any]] = []
        self._loader = DataLoader(
            dataset,
            batch_sampler=self,
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context="fork",
            collate_fn=collate,
            worker_init_fn=set_up,
        )
        self._iterator: Any = None

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, batches: list[list[Any]]) -> float:
        """CPU seconds of both processes until the batches are here; the first call also starts the worker."""
        self._batches = batches
        started = self._seconds()
        self._iterator = iter(self._loader)
        for _ in self._iterator:
            pass
        return self._seconds() - started

    def _seconds(self) -> float:
        worker = 0.0 if self._iterator is None else _seconds_of(self._iterator._workers[0].pid)
        return time.process_time() + worker


def _seconds_of(process: int) -> float:
    """CPU time of another process; the clock is that of clock_getcpuclockid, which Python lacks."""
    return time.clock_gettime((~process << 3) | 2)


class TimedReading:
    """Adds the CPU time in the reader to READING; replaces `open_video` of the data sets."""

    def __init__(self, *arguments: Any) -> None:
        self.video = timed(lambda: open_video(*arguments))

    def __len__(self) -> int:
        return len(self.video)

    def pictures(self, indices: Any) -> Any:
        return timed(lambda: self.video.pictures(indices))


def timed(work: Callable[[], Any]) -> Any:
    """The result of `work`, whose CPU time is added to READING."""
    started = time.process_time()
    result = work()
    READING.value += time.process_time() - started
    return result


def start_timed_worker(number: int) -> None:
    for module in ("mvd.data.datasets", "mvd.data.views"):
        sys.modules[module].open_video = TimedReading  # type: ignore[attr-defined]
    start_worker(number)


class Round(NamedTuple):
    """CPU seconds per sample; reading: the part of ours that is spent in the reader."""

    baseline: float
    ours: float
    reading: float


def measure(task: Task, paths: list[str], rounds: int) -> list[Round]:
    """Rounds over all videos, after a warm-up round; the two take turns in going first."""
    gc.collect()  # of earlier loaders, which the new workers would inherit
    dataset = task.ours([Entry(path, 0) for path in paths])
    if "prepared" in task.size:
        dataset.index = PacketIndex.of_folder(str(Path(paths[0]).parents[1]))
    is_test = isinstance(dataset, ViewDataset)
    plain = Feed(PlainDataset(task.baseline, paths), default_collate, lambda number: None)
    ours = Feed(dataset, dataset.collate, start_timed_worker)
    measured = []
    for number in range(rounds + 1):
        keys = [SampleKey(number, index) for index in range(len(paths))]
        batches = [
            keys[start : start + (1 if is_test else BATCH)] for start in range(0, len(keys), 1 if is_test else BATCH)
        ]
        own = [[key.index for key in batch] for batch in batches] if is_test else batches
        feeds, reading = [(plain, batches), (ours, own)], READING.value
        seconds = {feed: feed.read(which) / len(keys) for feed, which in (feeds if number % 2 else feeds[::-1])}
        measured.append(Round(seconds[plain], seconds[ours], (READING.value - reading) / len(keys)))
    return measured[1:]


def summary(task: Task, measured: list[Round]) -> list[str]:
    """The table's row of a task."""

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    return [
        task.name,
        task.size,
        spread([1000 * one.baseline for one in measured], 0),
        spread([1000 * one.ours for one in measured], 1),
        spread([one.baseline / one.ours for one in measured], 1),
        f"{task.least} / {task.aim}",
        f"{100 * statistics.mean(one.reading / one.ours for one in measured):.0f} %",
        f"{task.clips / statistics.mean(one.ours for one in measured):.0f}",
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
    files = write_clips(Path(arguments.folder))
    files |= write_prepared(files, Path(arguments.folder))
    clips = {size: [str(path.absolute()) for path in paths] for size, paths in files.items()}
    heads = ["task", "videos", "baseline ms", "ours ms", "ratio", "at least / aim", "decode share", "clips/s a core"]
    table, rates = Table(*heads), {}
    for task in tasks():
        if arguments.only in f"{task.name} {task.size}":
            measured = measure(task, clips[task.size], arguments.rounds)
            row = summary(task, measured)
            table.add_row(*row)
            rates[f"{task.name} {task.size}"] = task.clips / statistics.mean(one.ours for one in measured)
            print(f"{len(measured)} rounds: {' | '.join(row)}", file=sys.stderr, flush=True)
    console = Console(width=130)
    console.print(f"CPU milliseconds per sample on one core; {os.cpu_count()} cores, torch {torch.__version__}", table)
    if not arguments.only:
        both = [*files["340x256"], *files["568x320"]]
        console.print("memory of the loader's processes", memory_table(both, VIDEOS_FOR_MEMORY))
        console.print("cores that loading takes for one GPU", cores_per_gpu(rates, tuple(arguments.tflops)))


if __name__ == "__main__":
    main()
