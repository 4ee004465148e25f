"""Checks every video of a data set in parallel processes, and records the verdict on each."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvd.config import ConfigError
from mvd.data.prepare.transcode import check_video, reencode
from mvd.data.video.errors import UnreadableVideo
from mvd.data.workers import follow_parent

AT_ONCE = 4  # jobs that wait for each worker
LONGEST_NAME = 200  # bytes; file systems allow 255, of which suffixes and temporary names take some


@dataclass(frozen=True)
class Record:
    """What became of one file: the facts of the one to train on, or why it is set apart.

    source: the file that was checked, with its size and time of change; path: the one for the lists. temporary: the
    reason may pass, such as a full disk, and says nothing about the content: the next run checks the file again.
    """

    source: str
    size: int
    changed: float
    short_side: int | None
    path: str | None = None
    reason: str | None = None
    facts: dict[str, Any] | None = None
    temporary: bool = False


@dataclass(frozen=True)
class Job:
    """One file to check and, with a short side, to write again as `target`."""

    source: Path
    target: Path
    short_side: int | None


def work_on(job: Job) -> Record:
    """Checks one file, encodes it again where that is asked for, and checks the result."""
    try:
        status = job.source.stat()
    except OSError as error:  # it was there when the work was shared out
        return Record(str(job.source), 0, 0.0, job.short_side, reason=error.strerror, temporary=True)
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
        temporary = isinstance(error.__cause__, (OSError, MemoryError))
        return Record(**of_source, short_side=job.short_side, reason=error.reason, temporary=temporary)
    except OSError as error:  # of the copy's file
        reason = f"its copy cannot be written: {error.strerror}"
        return Record(**of_source, short_side=job.short_side, reason=reason, temporary=True)
    return Record(**of_source, short_side=job.short_side, path=str(path), facts=facts._asdict())


def target_of(path: Path, videos: Path, output: Path) -> Path:
    """Where the re-encoded copy of a video is written; different files have different ones."""
    name = path.name  # with its suffix: two files may differ in that alone
    if not path.is_relative_to(videos):
        return output / "videos" / _digest(path.parent) / f"{name}.mp4"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{os.fsencode(name)[: LONGEST_NAME // 2].decode(errors='ignore')}-{_digest(path)}"
    return output / "videos" / path.relative_to(videos).parent / f"{name}.mp4"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


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
    if record is None or record.temporary or record.short_side != job.short_side:
        return False
    try:
        status = job.source.stat()
    except OSError:
        return False
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
