"""Checks every video of a data set in parallel processes, and records a verdict on each."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvd.config import ConfigError
from mvd.data.prepare.transcode import Facts, check_video, reencode
from mvd.data.video.errors import Unreadable, UnreadableVideo, first_line, is_temporary
from mvd.data.workers import follow_parent

QUEUED_PER_WORKER = 4  # jobs
LONGEST_NAME = 200  # bytes; file systems allow 255, of which suffixes and temporary names take some
CHECKS = 3  # version of the checks: verdicts of another version are not reused


@dataclass(frozen=True)
class Record:
    """The verdict on one file: the properties of the file to train on, or why it is quarantined.

    source: the file that was checked, with its size and modification time; path: the one for the lists. temporary: the
    reason, such as a full disk, says nothing about the file's content, so the next run checks it again. checks: the
    version of the checks.
    """

    source: str
    size: int
    changed: float
    short_side: int | None
    path: str | None = None
    reason: str | None = None
    facts: dict[str, Any] | None = None
    temporary: bool = False
    checks: int = 1


@dataclass(frozen=True)
class Job:
    """One file to check and, if a short side is given (pixels), to re-encode as `target`."""

    source: Path
    target: Path
    short_side: int | None


def work_on(job: Job) -> Record:
    """Checks one file, re-encodes it if the job says so, and checks the result. Never raises: see Record.reason."""
    try:
        status = job.source.stat()
    except OSError as error:  # it was there when the jobs were made
        return Record(str(job.source), 0, 0.0, job.short_side, reason=error.strerror, temporary=True)
    record = Record(str(job.source), status.st_size, status.st_mtime, job.short_side, checks=CHECKS)
    try:
        path, facts = _make(job)
    except Unreadable as error:
        return replace(record, reason=error.reason, temporary=error.temporary)
    except OSError as error:
        return replace(record, reason=f"its copy cannot be written: {error.strerror}", temporary=True)
    except Exception as error:  # whatever a library raises on one file must not end the work on the others
        return replace(record, reason=first_line(error), temporary=is_temporary(error))
    return replace(record, path=str(path), facts=facts._asdict())


def _make(job: Job) -> tuple[Path, Facts]:
    """The file to train on, checked, and its properties."""
    facts = check_video(job.source)
    if job.short_side is None:
        return job.source, facts
    reencode(job.source, job.target, job.short_side)
    copied = check_video(job.target)
    if copied.frames != facts.frames:
        reason = f"its re-encoded copy has {copied.frames} frames instead of {facts.frames}"
        raise UnreadableVideo(str(job.source), reason)
    return job.target, copied


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
    """The records of earlier runs and shards, by source; a line that a kill has cut short is skipped."""
    records = {}
    for file in sorted(output.glob("records*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                record = Record(**json.loads(line))
                records[record.source] = record
    return records


def is_done(job: Job, record: Record | None) -> bool:
    """Whether a record is a verdict on this file as it is now, and on this way of encoding it."""
    if record is None or record.temporary or record.checks != CHECKS or record.short_side != job.short_side:
        return False
    try:
        status = job.source.stat()
    except OSError:
        return False
    same = (record.size, record.changed) == (status.st_size, status.st_mtime)
    return same and (record.path is None or Path(record.path).is_file())


def run_jobs(jobs: list[Job], workers: int, records_file: Path) -> Iterator[Record]:
    """Does the jobs in parallel; writes each record to `records_file`, then yields it, in the order of completion."""
    waiting = iter(jobs)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        running = {pool.submit(work_on, job) for job in islice(waiting, workers * QUEUED_PER_WORKER)}
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
            "a worker process was killed, probably because memory ran out; run the same command with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_all(jobs: list[Job], output: Path, shard: tuple[int, int], workers: int) -> None:
    """Checks this shard's share of the files that have no verdict yet, with a progress line."""
    records = read_records(output)
    number, count = shard
    share = jobs[number::count]
    left = [job for job in share if not is_done(job, records.get(str(job.source)))]
    if done := len(share) - len(left):
        print(f"{done:,} of {len(share):,} were checked by an earlier call", flush=True)
    name = "records.jsonl" if count == 1 else f"records-{number:04d}-of-{count:04d}.jsonl"
    broken = 0
    pause = 1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    with tqdm(total=len(left), unit="video", desc="checking", mininterval=pause, dynamic_ncols=True) as progress:
        for record in run_jobs(left, workers, output / name):
            broken += record.reason is not None
            progress.set_postfix_str(f"{broken} broken", refresh=False)
            progress.update()
