"""What a row has reached, read from its run directories. A damaged file costs only what it holds."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from launch.cli.output import counted
from launch.job.time_use import read_provenance
from launch.plan.differences import describe
from launch.plan.graph import Node, build_graph
from launch.reporting.run_settings import Run
from launch.stage_state import last_metrics
from mvd.config import ConfigError, Row, Test
from mvd.flops import throughput_text
from mvd.run_directory import RunDirectory

Value = TypeVar("Value")


class SeedRun(NamedTuple):
    """A finished test of the row with other seeds: kind of stage -> seed, its run directory, and its result."""

    seeds: dict[str, int]
    id: str
    result: dict[str, Any]


@dataclass(frozen=True)
class StageResult:
    """One stage of a row. epochs: of its recipe, None for a test; epochs_done: the completed ones."""

    node: Node
    files: RunDirectory
    result: dict[str, Any] | None
    epochs: int | None
    epochs_done: int

    @property
    def facts(self) -> dict[str, Any]:
        """Where the result comes from (mvd.provenance.result_facts); {} for a result of version 0.2 or before."""
        found: dict[str, Any] = (self.result or {}).get("provenance", {})
        return found

    @property
    def speed(self) -> str:
        """TFLOP/s a GPU and MFU of the last updates; empty for a test and for a run on CPUs."""
        return throughput_text(last_metrics(self.files) or {})

    @property
    def gpu_hours(self) -> float | None:
        """Of all its attempts so far; None if they did not record it."""
        return spent_gpu_hours(self.files, self.result)

    @property
    def started(self) -> bool:
        return self.files.path.is_dir()


@dataclass(frozen=True)
class RowResult:
    """A row and its stages, parents first.

    differs: in what it is not the row of experiments/, in one sentence, or empty. seeds: the finished tests of the same
    row with any seeds, its own included. problems: one sentence per file that cannot be read.
    """

    row: Row
    stages: list[StageResult]
    differs: str
    seeds: list[SeedRun] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def test(self) -> StageResult | None:
        """The test, if the row has one."""
        return next((stage for stage in self.stages if stage.node.kind == "test"), None)

    @property
    def result(self) -> dict[str, Any] | None:
        """The test's result."""
        return self.test.result if self.test else None

    @property
    def gpu_hours(self) -> float | None:
        """Of all attempts of all stages so far; None if none of them recorded it."""
        hours = [hours for stage in self.stages if (hours := stage.gpu_hours) is not None]
        return sum(hours) if hours else None


def spent_gpu_hours(files: RunDirectory, result: dict[str, Any] | None) -> float | None:
    """The GPU-hours of all attempts of a stage so far, 0 on CPUs; None if they did not record it."""
    facts = (result or {}).get("provenance", {})
    if "gpu_hours" in facts:
        return float(facts["gpu_hours"])
    attempts = [(part, entry) for part in files.job_files() for entry in read_provenance(part)]
    hours = [part.gpu_hours(entry) for part, entry in attempts if {"gpu", "processes", "started"} <= entry.keys()]
    return sum(hours) if hours else None


def row_result(row: Row, runs: Path, known: Sequence[Run]) -> RowResult:
    """What a row has reached.

    known: all runs of the folder, among which other seeds are searched.
    """
    problems: list[str] = []
    stages = []
    for node in build_graph([row]):
        files = RunDirectory(runs / node.id)
        result = attempt(partial(checked_result, files, node.kind == "test"), problems)
        epochs = None if isinstance(node.recipe, Test) else node.recipe.optimization.epochs
        stages.append(StageResult(node, files, result, epochs, _epochs_done(files, result, problems)))
    return RowResult(row, stages, describe(row), _other_seeds(row, known, problems), problems)


def checked_result(files: RunDirectory, is_test: bool) -> dict[str, Any] | None:
    """The content of result.json, None if there is none.

    Raises:
        ConfigError: it is damaged, or lacks a number that each result has.
    """
    result = files.read_result()
    if isinstance(result, dict) and "rehearsal" in result:
        return result
    needed = ("top1", "top5", "unreadable") if is_test else ("epochs",)
    if result is not None and not (isinstance(result, dict) and all(name in result for name in needed)):
        raise ConfigError(f"{files.result} is damaged; delete it and run the stage again")
    return result


def attempt(read: Callable[[], Value], problems: list[str]) -> Value | None:
    """What `read` returns; if a file is damaged or cannot be read, None, and its sentence is added to `problems`."""
    try:
        return read()
    except ConfigError as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"{error.filename or 'a file'} cannot be read: {error.strerror or error}"
    if sentence not in problems:
        problems.append(sentence)
    return None


class Spread(NamedTuple):
    """Mean and sample standard deviation."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.deviation:.1f}"


def spread(seeds: Sequence[SeedRun], name: str) -> Spread:
    """Of an accuracy over at least two seeds."""
    values = [run.result[name] for run in seeds]
    return Spread(statistics.mean(values), statistics.stdev(values))


def seeds_text(seeds: Sequence[SeedRun]) -> str:
    """The seeds in which the runs differ, as `finetune.seed 0, 1, 2`."""
    known = dict.fromkeys(kind for run in seeds for kind in run.seeds)  # a stage that cannot be read has no seed
    kinds = [kind for kind in known if len({run.seeds.get(kind) for run in seeds}) > 1]
    values = {kind: ", ".join(str(run.seeds.get(kind, "?")) for run in seeds) for kind in kinds}
    return "; ".join(f"{kind}.seed {text}" for kind, text in values.items())


def _other_seeds(row: Row, known: Sequence[Run], problems: list[str]) -> list[SeedRun]:
    """The tests that are those of the row with other seeds: their ids say so."""
    found = []
    for run in known:
        if row.test is None or run.stage.kind != "test" or run.group != f"test-{row.name}":
            continue
        seeded = {
            kind: dataclasses.replace(getattr(row, kind), seed=seed)
            for kind, seed in run.seeds.items()
            if getattr(row, kind)
        }
        if build_graph([dataclasses.replace(row, **seeded)])[-1].id != run.id:
            continue
        result = attempt(partial(checked_result, run.files, True), problems)
        if result is not None:
            found.append(SeedRun(run.seeds, run.id, result))
    return sorted(found, key=lambda run: sorted(run.seeds.items()))


def metrics_of(files: RunDirectory, problems: list[str]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; damaged lines are left out and reported, except for one that is being written."""
    records: list[dict[str, Any]] = []
    damaged = 0
    text = files.metrics.read_text(errors="replace") if files.metrics.exists() else ""
    for line in text.rpartition("\n")[0].splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    if damaged:
        problems.append(
            f"{files.metrics}: {counted(damaged, 'line')} of {len(records) + damaged} cannot be read, left out"
        )
    return records


def _epochs_done(files: RunDirectory, result: dict[str, Any] | None, problems: list[str]) -> int:
    """Completed epochs: all of a complete stage, else those before the epoch in the newest metrics line."""
    if result:
        return int(result.get("epochs", 0))
    epochs = [record["epoch"] for record in metrics_of(files, problems) if "epoch" in record]
    return int(epochs[-1]) - 1 if epochs else 0
