"""Makes a data set that is ready to train on: every video decoded once, the broken ones set apart, lists, a manifest.

Kinetics-400 and Something-Something V2, from their own annotation files:
    python -m mvd.data.prepare /raw/k400 data/k400 --dataset k400 --train train.csv --val validate.csv --short-side 320
    python -m mvd.data.prepare /raw/ssv2 data/ssv2 --dataset ssv2 --train train.json --val validation.json \\
        --labels labels.json
Your own videos, one folder per class (a tenth of them is held out for validation):
    python -m mvd.data.prepare my-videos data/mine

The same command goes on where it was interrupted. `python launch/prepare.py`, with the same words and `--array 32`,
shares the work out over a SLURM cluster. Machines without SLURM can share it too: give each `--shard NUMBER/COUNT`
(from 0) with the same OUTPUT, then run the command once without: it takes over what the shards have checked, does what
is left, and writes the lists.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mvd.config import DATASETS, ConfigError
from mvd.data.annotations import MANIFEST, class_count
from mvd.data.check import check_video, reencode
from mvd.data.listing import Found, class_numbers, find_class_folders, find_listed, read_list
from mvd.data.unreadable import UnreadableVideo
from mvd.data.workers import follow_parent
from mvd.files import write_json, write_text

SPLITS = ("train", "val", "test")
AT_ONCE = 4  # jobs that wait for each worker


@dataclass(frozen=True)
class Record:
    """What became of one file: the facts of the one to train on, or why it is set apart.

    source: the file that was checked, with its size and time of change; path: the one for the lists.
    """

    source: str
    size: int
    changed: float
    short_side: int | None
    path: str | None = None
    reason: str | None = None
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """One file to check and, with a short side, to write again as `target`."""

    source: Path
    target: Path
    short_side: int | None


def work_on(job: Job) -> Record:
    """Checks one file, encodes it again where that is asked for, and checks the result."""
    status = job.source.stat()
    of_source = {"source": str(job.source), "size": status.st_size, "changed": status.st_mtime}
    try:
        facts, path = check_video(job.source), job.source
        if job.short_side is not None:
            reencode(job.source, job.target, job.short_side)
            frames, path = facts.frames, job.target
            facts = check_video(path)
            if facts.frames != frames:
                raise UnreadableVideo(str(path), f"it has {facts.frames} frames where its source has {frames}")
    except UnreadableVideo as error:
        return Record(**of_source, short_side=job.short_side, reason=error.reason)
    return Record(**of_source, short_side=job.short_side, path=str(path), facts=facts._asdict())


def jobs_of(found: Sequence[Found], arguments: argparse.Namespace) -> list[Job]:
    """One job a file, however often it is listed; prints how many that are.

    Raises:
        ConfigError: there are none.
    """
    videos, output = arguments.videos, arguments.output
    sources = sorted({item.path for item in found if item.path is not None})
    missing = sum(item.path is None for item in found)
    print(f"{len(found):,} videos are listed, {missing:,} of them missing; {len(sources):,} files to check", flush=True)
    if not sources:
        raise ConfigError(f"none of the listed videos is below {videos}; check the folder and the lists")
    return [Job(path, target_of(path, videos, output), arguments.short_side) for path in sources]


def target_of(path: Path, videos: Path, output: Path) -> Path:
    inside = path.relative_to(videos) if path.is_relative_to(videos) else Path(path.name)
    return output / "videos" / inside.parent / f"{inside.name}.mp4"  # two files may differ in the suffix alone


def read_records(output: Path) -> dict[str, Record]:
    """What earlier runs and shards have found out, by source; a line that a kill has cut short is left out."""
    records = {}
    for file in sorted(output.glob("records*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                record = Record(**json.loads(line))
                records[record.source] = record
    return records


def is_done(job: Job, record: Record | None) -> bool:
    """Whether a record tells of this file as it is now, and of this way of encoding it."""
    if record is None or record.short_side != job.short_side:
        return False
    status = job.source.stat()
    same = (record.size, record.changed) == (status.st_size, status.st_mtime)
    return same and (record.path is None or Path(record.path).is_file())


def run_jobs(jobs: list[Job], workers: int, records_file: Path) -> Iterator[Record]:
    """Works on the jobs in parallel; each record is on the disk before it is yielded, in the order of completion."""
    waiting = iter(jobs)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        running = {pool.submit(work_on, job) for job in islice(waiting, workers * AT_ONCE)}
        with open(records_file, "a", encoding="utf-8") as handle:
            if handle.tell():
                handle.write("\n")  # the last run's last line may be half a line
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(work_on, job) for job in islice(waiting, len(finished))}
                for record in (future.result() for future in finished):
                    handle.write(json.dumps(asdict(record)) + "\n")
                    handle.flush()
                    yield record
    except BrokenProcessPool as error:
        raise ConfigError(
            "a worker process was killed, maybe for want of memory; run the same command with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_all(jobs: list[Job], output: Path, shard: tuple[int, int], workers: int) -> None:
    """Does this shard's share of what no earlier run has done, with a progress line."""
    records = read_records(output)
    number, count = shard
    left = [job for job in jobs[number::count] if not is_done(job, records.get(str(job.source)))]
    name = "records.jsonl" if count == 1 else f"records-{number:04d}-of-{count:04d}.jsonl"
    broken = 0
    pause = 1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    with tqdm(total=len(left), unit="video", desc="checking", mininterval=pause, dynamic_ncols=True) as progress:
        for record in run_jobs(left, workers, output / name):
            broken += record.reason is not None
            progress.set_postfix_str(f"{broken} broken", refresh=False)
            progress.update()


def write_lists(found: list[Found], records: dict[str, Record], output: Path) -> dict[str, Counter]:
    """Writes <split>.csv and quarantine.tsv; returns each split's counts of good, broken and missing videos."""
    counts: dict[str, Counter] = {}
    quarantine = []
    for split in {item.split: None for item in found}:
        lines: dict[str, int] = {}
        counts[split] = Counter(listed=0, good=0, broken=0, missing=0, repeated=0)
        for item in (item for item in found if item.split == split):
            counts[split]["listed"] += 1
            record = None if item.path is None else records[str(item.path)]
            if record is None or record.path is None:
                reason = "no such file" if record is None else record.reason
                counts[split]["missing" if record is None else "broken"] += 1
                quarantine.append(f"{split}\t{item.name}\t{reason}\n")
            elif record.path in lines:
                counts[split]["repeated"] += 1
                quarantine.append(f"{split}\t{item.name}\tits file is in the list already\n")
            else:
                counts[split]["good"] += 1
                lines[record.path] = item.label
        write_text(output / f"{split}.csv", "".join(f"{_relative(p, output)} {n}\n" for p, n in lines.items()))
    write_text(output / "quarantine.tsv", "".join(quarantine))
    if "test" not in counts and "val" in counts:  # accuracy is measured on the validation videos
        write_text(output / "test.csv", (output / "val.csv").read_text(encoding="utf-8"))
    return counts


def _relative(path: str, output: Path) -> str:
    return os.path.relpath(path, output) if Path(path).is_relative_to(output) else path


def write_manifest(
    output: Path, counts: dict[str, Counter], records: dict[str, Record], numbers: dict[str, int], dataset: str | None
) -> None:
    """manifest.json: counts beside the paper's, totals, classes and the facts of every good file."""
    good = (record for record in records.values() if record.path is not None)
    facts: dict[str, Any] = {_relative(record.path, output): record.facts for record in good}
    totals = {name: sum(fact[name] for fact in facts.values()) for name in ("frames", "seconds", "bytes")}
    splits = {split: {**count, "paper": _paper_count(dataset, split)} for split, count in counts.items()}
    classes = dict(sorted(numbers.items(), key=lambda item: item[1]))
    write_json(
        output / MANIFEST,
        {"dataset": dataset, "splits": splits, "totals": totals, "classes": classes, "files": facts},
    )


def _paper_count(dataset: str | None, split: str) -> int | None:
    if dataset is None:
        return None
    return DATASETS[dataset].train_samples if split == "train" else DATASETS[dataset].val_samples


def collect(arguments: argparse.Namespace) -> tuple[list[Found], dict[str, int]]:
    """The videos that are asked for and their classes' numbers; ConfigError for what cannot work."""
    videos = arguments.videos
    if arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}; give a number of processes, 1 or more")
    if not videos.is_dir():
        raise ConfigError(f"there is no folder {videos}; give the folder that holds the videos")
    files = {split: getattr(arguments, split) for split in SPLITS if getattr(arguments, split) is not None}
    if not files:
        found, numbers = find_class_folders(videos, arguments.val_share)
    else:
        lists = {split: read_list(file) for split, file in files.items()}
        numbers = class_numbers((item for listed in lists.values() for item in listed), arguments.labels)
        found = list(find_listed(videos, lists, numbers))
    if arguments.dataset is not None and class_count(numbers) > (known := DATASETS[arguments.dataset].classes):
        raise ConfigError(f"the lists name {len(numbers)} classes, but {arguments.dataset} has {known}; check them")
    return found, numbers


def print_counts(counts: dict[str, Counter], dataset: str | None, classes: int) -> None:
    table = Table("split", "listed", "ready to train", "broken", "missing", "repeated", "the paper's list")
    for split, count in counts.items():
        paper = _paper_count(dataset, split)
        values = (f"{count[name]:,}" for name in ("listed", "good", "broken", "missing", "repeated"))
        table.add_row(split, *values, "-" if paper is None else f"{paper:,}")
    Console().print(f"{classes} classes", table)


def main() -> int:
    parser = build_parser("python -m mvd.data.prepare", __doc__ or "")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="NUMBER/COUNT", help="this machine's share")
    return run(parser.parse_args())


def run(arguments: argparse.Namespace) -> int:
    """Runs the command, or a share of it; returns its exit code."""
    try:
        return prepare(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def prepare(arguments: argparse.Namespace) -> int:
    found, numbers = collect(arguments)
    jobs, output = jobs_of(found, arguments), arguments.output
    if arguments.dry_run:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    check_all(jobs, output, arguments.shard, arguments.workers)
    if arguments.shard[1] > 1:
        print("this shard is done; once all are, the last job or the command without --shard writes the lists")
        return 0
    records = read_records(output)
    counts = write_lists(found, records, output)
    write_manifest(output, counts, records, numbers, arguments.dataset)
    print_counts(counts, arguments.dataset, len(numbers))
    print(f"broken and missing videos, with reasons: {output / 'quarantine.tsv'}")
    if not any(count["good"] for count in counts.values()):
        raise ConfigError(f"not one video can be trained on; see {output / 'quarantine.tsv'}")
    print_next(arguments.dataset, output, counts, class_count(numbers))
    return 0


def profile_name(dataset: str | None, output: Path) -> str:
    """What the cluster profile and row files may call a data set; the known names are not for one's own."""
    own = re.sub(r"[^A-Za-z0-9_-]", "_", output.name)
    return dataset or (f"my_{own}" if own in DATASETS else own)


def print_next(dataset: str | None, output: Path, counts: dict[str, Counter], classes: int) -> None:
    """What to write into which file now, and the next command."""
    name = profile_name(dataset, output)
    print(f"\nnext:\n  name it in cluster.yaml:\n    datasets: {{{name}: {{root: {output}}}}}")
    row = f"vitb_from_vitb_{name}"
    if dataset is None:
        row = "YOUR_ROW.py"
        numbers = {split: counts.get(split, Counter())["good"] for split in ("train", "val")}
        facts = f"classes={classes}, train_samples={numbers['train']}, val_samples={numbers['val']}"
        print(f"  declare it in a row file of your own (README, Your own videos):\n    Dataset({facts})")
    print(f"  look at what a row sees of it:\n    python -m mvd.data.inspect {row}")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """What this command takes, and launch/prepare.py too."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)
    parser.add_argument("videos", type=_path, help="folder that holds the videos, at any depth")
    parser.add_argument("output", type=_path, help="folder of the data set: lists, manifest, and videos written again")
    parser.add_argument("--dataset", choices=("k400", "ssv2"), help="compare the counts with the paper's")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=_path, metavar="LIST", help=f"annotation file of the {split} videos")
    parser.add_argument("--labels", type=_path, help="Something-Something's labels.json")
    parser.add_argument("--val-share", type=float, default=0.1, help="held out of class folders (default: %(default)s)")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="write the videos again, this short at most")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write NUMBER/COUNT with NUMBER from 0 to COUNT - 1")
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main())
