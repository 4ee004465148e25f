"""--force: moves a stage's run directory away so that it starts from scratch."""

from collections.abc import Sequence
from pathlib import Path

from launch.cli.output import short
from launch.job.record import has_left, jobs_in_queue, locked, now, read_record
from launch.plan.graph import Node
from launch.slurm.client import slurm
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
from mvd.stage import Stage


def move_aside(name: str, nodes: Sequence[Node], stages: Sequence[Stage]) -> None:
    """Moves the run directories of a stage, given by id or kind, and of its descendants in the plan to `<runs>/old`.

    Raises:
        ConfigError: `name` matches no stage or several, or one of the stages is queued or running.
    """
    matching = [stage for stage in stages if name in (stage.id, stage.kind)]
    if len(matching) != 1:
        choice = ", ".join(stage.id for stage in (matching or stages))
        raise ConfigError(f"--force must match one stage, but {name!r} matches {len(matching)}; use one of {choice}")
    redone = {matching[0].id}
    for node in nodes:  # parents come first
        if redone & set(node.stage_parents):
            redone.add(node.id)
    runs = Path(matching[0].execution.runs)
    existing = [runs / stage.id for stage in stages if stage.id in redone and (runs / stage.id).exists()]
    with locked(runs):
        for directory in existing:
            _check_idle(directory)
        for directory in existing:
            aside = runs / "old" / f"{directory.name}-{now().replace(':', '')}"
            aside.parent.mkdir(exist_ok=True)
            directory.rename(aside)
            print(f"put aside: {short(aside)}")


def _check_idle(directory: Path) -> None:
    folders = RunDirectory(directory).job_files()
    records = [record for files in folders if (record := read_record(files)) and not has_left(files, record)]
    queued = jobs_in_queue(records) if slurm.is_available() else {}
    if queued or any(record.runs_locally for record in records):
        raise ConfigError(f"{directory.name} is queued or running; cancel it first")
