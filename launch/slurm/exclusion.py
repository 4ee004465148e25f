"""Machines that a stage's faults have named: its jobs avoid them for a day, as far as enough others are left."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from launch.slurm import client as slurm
from mvd.run_directory import RunDirectory

DAY = timedelta(hours=24)  # after which a machine is let in again; if it is no better, it is named again


def blamed_hosts(directories: Iterable[Path]) -> list[str]:
    """The machines that the faults of these run directories have named within a day, the last one first."""
    since = datetime.now(UTC) - DAY
    faults = [fault for directory in directories for fault in RunDirectory(directory).read_faults()]
    recent = [fault for fault in faults if datetime.fromisoformat(fault["time"]) >= since]
    recent.sort(key=lambda fault: fault["time"], reverse=True)
    return list(dict.fromkeys(host for fault in recent for host in fault["hosts"]))


def exclusion(own: str, hosts: Iterable[str]) -> str:
    """A list of nodes in sbatch's words: those that the profile excludes, and these."""
    return ",".join(name for name in (own, *hosts) if name)


def excludable_hosts(script: Path, own: str, hosts: list[str]) -> tuple[list[str], str]:
    """As many of these machines as the job can do without, the first ones first, and SLURM's objection to one more."""
    objection = ""
    for count in range(len(hosts), 0, -1):
        refused = slurm.exclusion_error(script, exclusion(own, hosts[:count]))
        if not refused:
            return hosts[:count], objection
        objection = refused
    return [], objection
