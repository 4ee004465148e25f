"""Hosts that a stage's faults were blamed on: its jobs avoid them for a day, as long as enough others are left."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from launch.slurm.client import slurm
from mvd.run_directory import RunDirectory

DAY = timedelta(hours=24)  # after which a host is used again; if it is no better, it is blamed again


def blamed_hosts(directories: Iterable[Path]) -> list[str]:
    """Hosts blamed in the faults.jsonl of these run directories during the last 24 h, newest first."""
    since = datetime.now(UTC) - DAY
    faults = [fault for directory in directories for fault in RunDirectory(directory).read_faults()]
    recent = [fault for fault in faults if datetime.fromisoformat(fault["time"]) >= since]
    recent.sort(key=lambda fault: fault["time"], reverse=True)
    return list(dict.fromkeys(host for fault in recent for host in fault["hosts"]))


def exclusion(own: str, hosts: Iterable[str]) -> str:
    """A value for sbatch --exclude: the nodes that the profile excludes, and these hosts."""
    return ",".join(name for name in (own, *hosts) if name)


def excludable_hosts(script: Path, own: str, hosts: list[str]) -> tuple[list[str], str]:
    """The longest prefix of `hosts` that SLURM lets the job exclude, and its error for one more host, or "".

    If SLURM refuses the job for the same reason without any of them (a limit on the number of jobs, or no submission
    from this host), its answer says nothing about the hosts; then the newest one is excluded.
    """
    error = ""
    for count in range(len(hosts), 0, -1):
        refused = slurm.exclusion_error(script, exclusion(own, hosts[:count]))
        if not refused:
            return hosts[:count], error
        error = refused
    if hosts and slurm.exclusion_error(script, own) == error:
        return hosts[:1], error
    return [], error
