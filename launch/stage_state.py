"""State of each stage, from its run directory, squeue and sacct."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.job.record import ON_REQUEST, Record, has_left, jobs_in_history, jobs_in_queue, read_record, was_cancelled
from launch.job.time_use import seconds_of_restarts
from launch.plan.graph import Node
from launch.slurm.client import slurm
from launch.slurm.jobs import EndedJob, QueuedJob
from mvd.config import KINDS, ConfigError, Kind, Test
from mvd.flops import throughput_text
from mvd.run_directory import RunDirectory

TAIL_BYTES = 16_384


def result_text(result: dict[str, Any]) -> str:
    """The result of a stage in one line: loss, and accuracies with their split."""
    if "rehearsal" in result:
        return "rehearsed"
    if "top1" in result:
        return f"test top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %"
    loss = f"training loss {result['loss']:.4f}" if result.get("loss") is not None else "no loss"
    return f"{loss}, validation top-1 {result['val_top1']:.1f} %" if "val_top1" in result else loss


@dataclass(frozen=True)
class StageInfo:
    """A stage as status.py sees it: from the plan, or from its run directory.

    epochs, batch: None for a test. problem: why the stage cannot be read, in one sentence, or empty.
    """

    id: str
    kind: Kind
    rows: tuple[str, ...]
    parents: tuple[str, ...]
    epochs: int | None
    batch: int | None
    problem: str = ""


@dataclass(frozen=True)
class State:
    """A state.

    word: waiting, queued, running, ending, done, failed, cancelled, stopped, new, or damaged for a run directory that
    cannot be read. text: the same in full.
    """

    word: str
    text: str
    record: Record | None = None

    @property
    def lost(self) -> bool:
        """Whether the stage will not complete unless it is submitted again."""
        return self.word in ("failed", "cancelled")


def from_plan(nodes: Sequence[Node]) -> list[StageInfo]:
    """The stages of a plan."""
    found = []
    for node in nodes:
        settings = None if isinstance(node.recipe, Test) else node.recipe.optimization
        length = (settings.epochs, settings.global_batch) if settings else (None, None)
        found.append(StageInfo(node.id, node.kind, node.rows, tuple(node.stage_parents), *length))
    return found


def from_runs(runs: Path) -> list[StageInfo]:
    """The stages of a runs folder, parents before children."""
    found = []
    for path in runs.glob("*/stage.yaml"):
        try:
            found.append(_from_run(path))
        except ConfigError as error:
            name = path.parent.name
            kind = next((kind for kind in KINDS if name.startswith(f"{kind}-")), KINDS[-1])
            found.append(StageInfo(name, kind, (), (), None, None, str(error)))
    return sorted(found, key=lambda known: (KINDS.index(known.kind), known.rows, known.id))


def _from_run(path: Path) -> StageInfo:
    records = [record for files in RunDirectory(path.parent).job_files() if (record := read_record(files))]
    record = min(records, key=lambda record: record.submitted, default=None)
    try:
        stage = OmegaConf.load(path)
        kind: Kind = KINDS[KINDS.index(stage.kind)]
        length = (OmegaConf.select(stage, f"recipe.optimization.{name}") for name in ("epochs", "global_batch"))
        rows, parents = (tuple(record.rows), tuple(record.parents)) if record else ((), ())
        return StageInfo(path.parent.name, kind, rows, parents, *length)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, AttributeError, OSError) as error:
        raise ConfigError(f"{path} is damaged; submit its row again") from error


def stage_states(stages: Sequence[StageInfo], runs: Path) -> dict[str, State]:
    """Stage id -> state; parents must come before children."""
    folders = {stage.id: RunDirectory(runs / stage.id).job_files() for stage in stages}
    damaged = {stage.id: stage.problem for stage in stages if stage.problem}
    records: dict[RunDirectory, Record | None] = {}
    results: dict[str, dict[str, Any] | None] = {}
    for stage in stages:
        try:
            records |= {folder: read_record(folder) for folder in folders[stage.id]}
            results[stage.id] = RunDirectory(runs / stage.id).read_result()
        except ConfigError as error:
            damaged.setdefault(stage.id, str(error))
    submitted = [record for record in records.values() if record and not record.is_local]
    queued = jobs_in_queue(submitted) if slurm.is_available() else {}
    left = [record for record in submitted if record.job_id not in queued]
    over = jobs_in_history(left) if slurm.is_available() else {}
    states: dict[str, State] = {}
    for stage in stages:
        if stage.id in damaged:
            states[stage.id] = State("damaged", damaged[stage.id])
            continue
        result = results[stage.id]
        jobs = [(folder, records[folder]) for folder in folders[stage.id]]
        if result:
            states[stage.id] = State("done", f"done: {result_text(result)}", jobs[0][1])
            continue
        parts = [_job_state(stage, folder, record, queued, over, states) for folder, record in jobs]
        states[stage.id] = parts[0] if len(parts) == 1 else _together(parts)
    return states


def _job_state(
    stage: StageInfo,
    files: RunDirectory,
    record: Record | None,
    queued: Mapping[str, QueuedJob],
    over: Mapping[str, EndedJob],
    states: Mapping[str, State],
) -> State:
    if record is None and not files.provenance.exists():
        return State("new", "not submitted")
    if record is None:
        return State("stopped", f"not in the queue; {_progress(stage, files)}")
    again = _restarts(files, record)
    again += f"; avoids {', '.join(record.avoided)}" if record.avoided else ""
    if files.result.exists():
        return State("done", "done", record)
    if record.runs_locally:
        return State("running", f"running on {record.attempts[-1].host}: {_progress(stage, files)}", record)
    if was_cancelled(files, record.folder):
        others = ", while its job goes on with others" if record.job_id in queued else ""
        return State("cancelled", f"cancelled{others}{again}", record)
    if record.job_id in queued and not has_left(files, record):
        job = queued[record.job_id]
        if job.is_completing:
            return State("ending", f"ending: SLURM cleans up after its job (COMPLETING){again}", record)
        if job.runs:
            return State("running", f"running for {job.elapsed}: {_progress(stage, files)}{again}", record)
        if job.reason == "Dependency":
            waits = [parent for parent in stage.parents if parent in states and states[parent].word != "done"]
            return State("waiting", f"waiting for {', '.join(waits) or 'its parents'}{again}", record)
        return State("queued", f"queued ({job.reason}){again}", record)
    if record.error:
        return State("failed", f"failed: {record.error.splitlines()[-1]}{again}", record)
    lost = [parent for parent in stage.parents if parent in states and states[parent].lost]
    if lost and not (record.attempts and record.attempts[-1].job_id == record.job_id):
        return State("cancelled", f"cancelled: its parent {lost[0]} {states[lost[0]].word}", record)
    ended = over.get(record.job_id)
    return _ended(record, ended.state if ended else "", again)


def _restarts(files: RunDirectory, record: Record) -> str:
    """How often the job was started again, and how long it took each time until it trained."""
    took = {kind: f" ({duration(round(seconds))} each)" for kind, seconds in seconds_of_restarts(files, record).items()}
    requeued = f"; requeued {record.requeued} times{took.get(False, '')}" if record.requeued else ""
    in_place = f"; restarted in place {record.restarted} times{took.get(True, '')}" if record.restarted else ""
    fewer = record.attempts[-1].shrunk_to if record.attempts and not record.attempts[-1].ended else 0
    shrunk = f"; on {fewer} GPUs until the next requeue" if fewer else ""
    return requeued + in_place + shrunk


def _ended(record: Record, state: str, again: str) -> State:
    """State of a job that left the queue without recording an error."""
    if state.startswith("CANCELLED"):
        return State("cancelled", f"cancelled{again}", record)
    if record.is_local:
        ended = record.attempts[-1].error
        printed = None if ended == ON_REQUEST else last_error(record.log())
        return State("stopped", f"stopped: {printed or ended or 'its launcher is gone'}", record)
    last = last_error(record.log())
    reason = f"SLURM says {state}" if state else "its job has left the queue"
    return State("failed", f"failed: {last or reason}{again}", record)


def _together(parts: Sequence[State]) -> State:
    """One state for a split test."""
    counts = {
        word: sum(part.word == word for part in parts) for word in ("done", "running", "ending", "queued", "waiting")
    }
    worst = next((part for part in parts if part.lost), None)
    if worst:
        return worst
    word = next((word for word in ("running", "ending", "queued", "waiting") if counts[word]), "queued")
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return State(word, f"{word}: {len(parts)} shards, {said}", parts[0].record)


def _progress(stage: StageInfo, files: RunDirectory) -> str:
    """Epoch, clips/s and remaining time, from the newest line of metrics.jsonl."""
    if stage.epochs is None or stage.batch is None:
        return "testing"
    metrics = last_metrics(files)
    if metrics is None:
        return f"starting, 0 of {stage.epochs} epochs"
    text = f"epoch {metrics['epoch']} of {stage.epochs}"
    rate, done = metrics.get("samples_per_second"), metrics.get("epochs_done")
    if not rate:
        return text
    unit = "images" if stage.kind == "image_teacher" else "clips"
    left = ""
    if done:
        updates = metrics["update"] / done * (stage.epochs - done)
        left = f", {duration(updates * stage.batch / rate)} left"
    speed = ", ".join(filter(None, [f"{rate:.1f} {unit}/s", throughput_text(metrics)]))
    return f"{text}, {speed}{left}"


def last_metrics(files: RunDirectory) -> dict[str, Any] | None:
    """The newest training record of metrics.jsonl, read from its end."""
    lines = _tail(files.metrics)
    for line in reversed(lines[-50:]):
        try:
            record = json.loads(line)
        except ValueError:  # the first line is cut off, the last one may be being written
            continue
        if isinstance(record, dict) and "samples_per_second" in record:
            return record
    return None


def faults_of(directory: Path) -> str | None:
    """Number of faults of each kind and the last fault's message, or None without faults."""
    faults = RunDirectory(directory).read_faults()
    if not faults:
        return None
    counts = Counter(fault["fault"] for fault in faults)
    summary = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    return f"{summary}; the last, at {faults[-1]['time']}: {faults[-1]['message']}"


def last_error(log: Path) -> str | None:
    """The last line of the newest attempt in a log that tells of an error, as `error: ...` or `ValueError: ...`."""
    for line in reversed(_tail(log)):
        if line.startswith("=== job "):
            return None
        if "error:" in line.lower() and " WARNING " not in line:
            return line
    return None


def _tail(path: Path) -> list[str]:
    if not path.exists():
        return []
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return handle.read().decode(errors="replace").splitlines()


def duration(seconds: float) -> str:
    """A duration in at most two units: `3 d 4 h`, `2 h 10 min`, `45 s`."""
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count:.0f} {name}")
    return " ".join(parts[:2]) or "0 s"
