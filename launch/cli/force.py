"""--force: moves a stage's run directory away so that it starts from scratch."""

from collections.abc import Sequence, Set
from pathlib import Path

from launch.cli.output import short
from launch.job.record import all_records, locked, now, refuse_active
from launch.plan.graph import Node
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
from mvd.stage import Stage


def move_aside(name: str, nodes: Sequence[Node], stages: Sequence[Stage]) -> None:
    """Moves the run directories of a stage, given by id or kind, and of its descendants to `<runs>/old`.

    Descendants are those of the plan, and those that other rows have in the runs folder.

    Raises:
        ConfigError: `name` matches no stage or several, or one of the stages is queued or running.
    """
    chosen = forced_stage(name, stages)
    redone = {chosen.id}
    for node in nodes:  # parents come first
        if redone & set(node.stage_parents):
            redone.add(node.id)
    runs = Path(chosen.execution.runs)
    with locked(runs):
        others = _descendants_of_other_rows(runs, redone)
        existing = [runs / name for name in (*(stage.id for stage in stages if stage.id in redone), *others)]
        existing = [directory for directory in existing if directory.exists()]
        for directory in existing:
            refuse_active(RunDirectory(directory))
        for directory in existing:
            aside = runs / "old" / f"{directory.name}-{now().replace(':', '')}"
            aside.parent.mkdir(exist_ok=True)
            directory.rename(aside)
            whose = f", of {', '.join(rows)}" if (rows := others.get(directory.name)) else ""
            print(f"put aside: {short(aside)}{whose}")


def forced_stage(name: str, stages: Sequence[Stage]) -> Stage:
    """The stage that --force names, by id or kind; ConfigError if it matches none or several."""
    matching = [stage for stage in stages if name in (stage.id, stage.kind)]
    if len(matching) != 1:
        choice = ", ".join(stage.id for stage in (matching or stages))
        raise ConfigError(f"--force must match one stage, but {name!r} matches {len(matching)}; use one of {choice}")
    return matching[0]


def _descendants_of_other_rows(runs: Path, redone: Set[str]) -> dict[str, list[str]]:
    """Stage id -> its rows, for what was submitted earlier and starts from one of these stages, but is none of them."""
    records = [(stage, record) for stage, _, record in all_records(runs)]
    found: dict[str, list[str]] = {}
    while True:
        new = {
            stage: record.rows
            for stage, record in records
            if stage not in {*redone, *found} and {*redone, *found} & set(record.parents)
        }
        if not new:
            return found
        found |= new
