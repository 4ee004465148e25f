"""--force: puts a stage's run directory aside, so that it begins anew."""

from collections.abc import Sequence
from pathlib import Path

from launch.cli.output import short
from launch.job.record import jobs_in_queue, locked, now, read_record
from launch.plan.graph import Node
from launch.slurm.client import slurm
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
from mvd.stage import Stage


def move_aside(name: str, nodes: Sequence[Node], stages: Sequence[Stage]) -> None:
    """Moves the run directory of the one stage that `name` (an id or a kind) means to `<runs>/old`.

    So it does with those of the plan's stages that were made from it.

    Raises:
        ConfigError: no stage or several are meant, or one of them is under way.
    """
    meant = [stage for stage in stages if name in (stage.id, stage.kind)]
    if len(meant) != 1:
        choice = ", ".join(stage.id for stage in (meant or stages))
        raise ConfigError(f"--force {name} means {len(meant)} stages; name one of {choice}")
    redone = {meant[0].id}
    for node in nodes:  # parents come first
        if redone & set(node.stage_parents):
            redone.add(node.id)
    runs = Path(meant[0].execution.runs)
    there = [runs / stage.id for stage in stages if stage.id in redone and (runs / stage.id).exists()]
    with locked(runs):
        for directory in there:
            _check_idle(directory)
        for directory in there:
            aside = runs / "old" / f"{directory.name}-{now().replace(':', '')}"
            aside.parent.mkdir(exist_ok=True)
            directory.rename(aside)
            print(f"put aside: {short(aside)}")


def _check_idle(directory: Path) -> None:
    records = [record for files in RunDirectory(directory).job_files() if (record := read_record(files))]
    queued = jobs_in_queue(records) if slurm.is_available() else {}
    if queued or any(record.runs_locally for record in records):
        raise ConfigError(f"{directory.name} is queued or running; cancel it first")
