"""The report's table of goodput: what part of their jobs' time the stages of a row have spent on what."""

from collections.abc import Sequence
from functools import partial

from launch.job.record import read_record
from launch.job.time_use import TimeUse, time_use
from launch.reporting.results import RowResult, StageResult, attempt
from mvd.config import Test

COLUMNS = ["stage#", "hours held>", "updates %>", "data %>", "saves %>", "evaluations %>", "starts %>", "lost %>"]
COLUMNS += ["restarts in place / requeues>", "hours queued>"]


def goodput_lines(results: Sequence[RowResult]) -> list[list[str]]:
    """A line per training stage that has recorded its time; a stage that several rows share has one."""
    lines: dict[str, list[str]] = {}
    for result in results:
        for stage in result.stages:
            if stage.node.id not in lines and (line := _line(stage, result.problems)) is not None:
                lines[stage.node.id] = line
    return list(lines.values())


def _line(stage: StageResult, problems: list[str]) -> list[str] | None:
    recipe = stage.node.recipe
    if isinstance(recipe, Test) or not stage.started:
        return None
    record = attempt(partial(read_record, stage.files), problems)
    used = time_use(stage.files, record, recipe.optimization.global_batch)
    if used is None:
        return None
    restarts = f"{record.restarted} / {record.requeued}" if record else "-"
    return [stage.node.id, f"{used.allocated / 3600:,.2f}", *_shares(used), restarts, f"{used.queue / 3600:,.2f}"]


def _shares(used: TimeUse) -> list[str]:
    parts = (used.updates, used.data, used.saves, used.evaluations, used.starts, used.lost)
    return [f"{100 * part / used.allocated:.1f}" for part in parts]
