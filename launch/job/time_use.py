"""Where the time of a stage's jobs went: into updates that are in the result, or into something else.

Read from job.json, provenance.json and metrics.jsonl, which a resumed run cuts back to its checkpoint: what it holds of
updates is in the result.
"""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from launch.job.record import Attempt, Record
from mvd.run_directory import RunDirectory


@dataclass(frozen=True)
class TimeUse:
    """Seconds of a training stage.

    allocated: all that its jobs have held, the sum of the others except for queue. updates: those in the result,
    without waiting for data. lost: updates that were repeated, and the ends of attempts. queue: before the first
    allocation of the newest submission, and between those of one job.
    """

    allocated: float
    updates: float
    data: float
    saves: float
    evaluations: float
    starts: float
    lost: float
    queue: float

    @property
    def goodput(self) -> float:
        """Share of the allocated time that went into updates that are in the result."""
        return self.updates / self.allocated


class Span(NamedTuple):
    """An attempt, in seconds since the epoch. training: when its first update began; `ended` if it came to none."""

    started: float
    training: float
    ended: float
    in_place: bool
    job: str


def time_use(files: RunDirectory, record: Record | None, batch: int) -> TimeUse | None:
    """How a training stage has used its time so far; None for one that has not trained, or not since this is recorded.

    batch: its global batch.
    """
    entries = read_provenance(files)
    spans = _spans(entries, record, files)
    if not spans or not any("training" in entry for entry in entries):
        return None
    pairs = [pair for pair in itertools.pairwise(spans) if pair[0].job == pair[1].job]
    gaps = [(after.in_place, max(after.started - before.ended, 0.0)) for before, after in pairs]
    in_place = sum(gap for is_in_place, gap in gaps if is_in_place)
    queue = sum(gap for is_in_place, gap in gaps if not is_in_place)
    if record is not None and not record.is_local:
        first = [span.started for span in spans if span.job == record.job_id][:1]
        queue += sum(max(started - _seconds(record.submitted), 0.0) for started in first)
    allocated = sum(span.ended - span.started for span in spans) + in_place
    starts = sum(span.training - span.started for span in spans) + in_place
    kept = _kept(files.read_metrics(), batch)
    lost = max(allocated - starts - sum(kept.values()), 0.0)
    return TimeUse(max(allocated, 1.0), starts=starts, lost=lost, queue=queue, **kept)


def seconds_of_restarts(files: RunDirectory, record: Record) -> dict[bool, float]:
    """Seconds from the end of an attempt until the next one trained, on average; True: in place, False: requeued.

    Only attempts of this record whose end and training are recorded count; a kind without one is left out.
    """
    trained = {entry.get("owner"): entry["training"] for entry in read_provenance(files) if "training" in entry}
    found: dict[bool, list[float]] = {}
    for before, after in itertools.pairwise(record.attempts):
        if before.ended and after.name in trained:
            found.setdefault(after.start > 0, []).append(_seconds(trained[after.name]) - _seconds(before.ended))
    return {in_place: statistics.mean(seconds) for in_place, seconds in found.items()}


def read_provenance(files: RunDirectory) -> list[dict[str, Any]]:
    """The entries of provenance.json; none if it cannot be read."""
    try:
        entries = json.loads(files.provenance.read_text())
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _spans(entries: Sequence[Mapping[str, Any]], record: Record | None, files: RunDirectory) -> list[Span]:
    """The attempts, oldest first: those of the newest submission, and those of earlier ones that came to training.

    The last one may be running, or its end was not noted: it counts until it last wrote something.
    """
    own: dict[str, Attempt] = {attempt.name: attempt for attempt in record.attempts} if record else {}
    ends = [entry.get("ended") for entry in entries]  # of all but the last one, as the next one has noted
    spans = []
    for entry, ended in zip(entries, ends, strict=True):
        name = str(entry.get("owner"))
        attempt = own.pop(name, None)
        started = attempt.started if attempt else entry["started"]
        end = (attempt.ended if attempt else None) or ended or files.last_sign(started)
        in_place = attempt is not None and attempt.start > 0
        spans.append(_span(started, entry.get("training"), end, in_place, name.partition(".")[0]))
    spans += [_span(a.started, None, a.ended, a.start > 0, a.job_id) for a in own.values() if a.ended]
    return sorted(spans)


def _span(started: str, training: str | None, ended: str, in_place: bool, job: str) -> Span:
    last = max(_seconds(ended), _seconds(started))
    return Span(_seconds(started), min(_seconds(training), last) if training else last, last, in_place, job)


def _kept(records: Sequence[Mapping[str, Any]], batch: int) -> dict[str, float]:
    """Seconds of updates, of waiting for data, of saves and of evaluations that metrics.jsonl holds."""
    kept = dict.fromkeys(("updates", "data", "saves", "evaluations"), 0.0)
    before = 0
    for record in records:
        kept["saves"] += record.get("speed/save_seconds", 0.0)
        kept["evaluations"] += record.get("speed/evaluation_seconds", 0.0)
        if "samples_per_second" in record:
            seconds = (record["update"] - before) * batch / record["samples_per_second"]
            waited = seconds * record.get("data_wait_share", 0.0)
            kept["updates"] += seconds - waited
            kept["data"] += waited
            before = record["update"]
    return kept


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
