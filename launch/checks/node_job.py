"""A job of one minute on one node, which looks at it from inside (launch.checks.node)."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.checks.finding import Finding
from launch.checks.node import END
from launch.cluster import Cluster, Layout
from launch.slurm.client import slurm
from launch.slurm.sbatch import call_sbatch, new_folder
from launch.slurm.script import profile_parameters
from launch.snapshot import take_snapshot
from mvd.config import ConfigError

SECONDS_BETWEEN = 2.0
LIMIT_HOURS = 5 / 60  # it takes a minute, unless torch is read from a slow disk for the first time


@dataclass(frozen=True)
class CheckNode:
    """What the job runs; for submitit to pickle."""

    runs: str
    gpus: int

    def __call__(self) -> None:
        subprocess.run([sys.executable, "-m", "launch.checks.node", self.runs, str(self.gpus)], check=False)


def run_test_job(cluster: Cluster, minutes: float) -> Iterator[Finding]:
    """Submits the job, waits for it, and passes on what it found; cancels it if it has not ended in time."""
    folder = new_folder(Path(cluster.runs) / "jobs", "doctor")
    how = dataclasses.replace(cluster.slurm, time_limit_hours=LIMIT_HOURS, warning_seconds=5)
    asked = {
        "job_name": "mvd-doctor",
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": how.cpus_per_gpu,
        "mem": f"{how.memory_gb * 1000:.0f}M" if how.memory_gb else None,
    }
    code = take_snapshot(Path(cluster.runs))
    settings = profile_parameters(how, code, asked, Layout(1, 1))
    try:
        job = call_sbatch(folder, settings, [CheckNode(cluster.runs, cluster.gpus_per_node)], "doctor")
    except ConfigError as error:
        yield Finding("test job", False, str(error))
        return
    try:
        yield from _wait(job, folder / f"{job}_0_log.out", minutes)
    except KeyboardInterrupt:
        slurm.cancel([job])
        raise


def _wait(job: str, log: Path, minutes: float) -> Iterator[Finding]:
    deadline = time.monotonic() + 60 * minutes
    while waiting := slurm.queue([job]):
        if time.monotonic() > deadline:
            slurm.cancel([job])
            reason = waiting[job].reason if job in waiting else "?"
            text = f"job {job} had not ended after {minutes:g} minutes ({reason}) and is cancelled; try --minutes 60"
            yield Finding("test job", False, text)
            return
        time.sleep(SECONDS_BETWEEN)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [line.split("|", 3) for line in lines if line.startswith("doctor|") and line.count("|") >= 3]
    for _, verdict, subject, text in found:
        yield Finding(subject, verdict == "ok", text)
    if END not in lines:
        last = lines[-1] if lines else "it printed nothing"
        yield Finding("test job", False, f"job {job} did not get to the end of its checks ({last}); see {log}")
