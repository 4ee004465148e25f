"""Prepares a data set on a SLURM cluster: an array of jobs checks the videos, then one job writes the lists.

Takes the arguments of `python -m mvd.data.prepare`, whose --help explains the data. The jobs are submitted as set in
the cluster profile, without GPUs: each gets the cores (or --workers) and the memory that belong to one GPU of a node.
cluster.KEY=VALUE changes the profile for this command, such as cluster.slurm.partition=cpu. Running the same command
again is safe: checked files are not checked again, and queued or running jobs are left alone.

examples:
  python launch/prepare.py /raw/k400 data/k400 --dataset k400 --train train.csv --val validate.csv --short-side 320 \\
      --array 32 --dry-run
  python launch/prepare.py my-videos data/mine --array 4 --workers 16 cluster.slurm.partition=cpu
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, print_next, print_table, short
from launch.cli.parser import run_command
from launch.cluster import Cluster, Layout, Slurm, check_log_folder, load_cluster
from launch.job.record import locked
from launch.slurm.client import slurm
from launch.slurm.sbatch import call_sbatch, new_folder
from launch.slurm.script import profile_parameters
from launch.snapshot import take_snapshot
from mvd.config import ConfigError
from mvd.config.typed import parse_override
from mvd.data.prepare.prepare import build_parser, collect, jobs_of
from mvd.data.prepare.summary import profile_name

CORES = 8  # per job, if neither --workers nor the profile sets them


class Submission(NamedTuple):
    """Ids of the submitted array and of the last job, and the folders of their scripts and logs."""

    array: str
    last: str
    array_folder: Path
    last_folder: Path


def main(argv: Sequence[str]) -> int:
    """Checks the request, then prints its plan or submits it; returns the exit code."""
    options = parse(argv)
    settings = [parse_override(word) for word in options.settings]
    for setting in settings:
        if setting.path[0] != "cluster" or len(setting.path) < 2:
            raise ConfigError(
                f"{setting.text}: only settings of the cluster profile are accepted, as cluster.KEY=VALUE"
            )
    profile = [dataclasses.replace(setting, path=setting.path[1:]) for setting in settings]
    cluster = load_cluster(options.cluster, profile)
    check_log_folder("OUTPUT", options.output.absolute())
    if options.workers is None:
        options.workers = cores(cluster.slurm)
    jobs_of(collect(options).found, options)
    if options.dry_run:
        print_plan(options, cluster, argv)
        return 0
    if not slurm.is_available():
        raise ConfigError("there is no sbatch on this machine; log in to the cluster, or run mvd.data.prepare here")
    with locked(Path(cluster.runs)):
        queued = queued_jobs(options.output)
        submission = None if queued else submit(options, cluster)
    if submission is None:
        print(f"queued or running already: {', '.join(queued)}; once they have ended, the same command continues")
        print_next([("show the jobs in the queue", f"squeue --jobs {','.join(queued)}"), done_so_far(options)])
    else:
        print_submission(options, submission, argv)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's options.

    Raises:
        ConfigError: an unknown option or an invalid value.
    """
    parser = build_parser("prepare.py", __doc__ or "")
    parser.add_argument("settings", nargs="*", metavar="cluster.KEY=VALUE", help="settings of the cluster profile")
    parser.add_argument(
        "--array",
        type=int,
        default=8,
        metavar="JOBS",
        help="number of jobs to split the work into (default: %(default)s)",
    )
    parser.add_argument("--cluster", metavar="FILE", help="cluster profile (default: $MVD_CLUSTER, or cluster.yaml)")
    parser.set_defaults(workers=None)
    options = parser.parse_intermixed_args(argv)
    if options.array < 1:
        raise ConfigError(
            f"--array must be at least 1, got {options.array}; give the number of jobs to split the work into"
        )
    return options


def cores(how: Slurm) -> int:
    """Cores per GPU, from the profile's sbatch options or its cpus_per_gpu."""
    given = {name.replace("-", "_"): value for name, value in how.options.items()}
    return int(given.get("cpus_per_task") or how.cpus_per_gpu or CORES)


def job_parameters(options: argparse.Namespace, cluster: Cluster, code: Path, name: str, after: str) -> dict[str, Any]:
    """submitit's parameters of one of the jobs: those of the profile, without the ones about GPUs."""
    without = {k: v for k, v in cluster.slurm.options.items() if "gpu" not in k and not k.startswith(("gres", "cpus"))}
    memory = cluster.slurm.memory_gb
    asked = {
        "job_name": f"{name}-{profile_name(options.dataset, options.output)}",
        "cpus_per_task": options.workers,
        "mem": f"{memory * 1000 / cluster.gpus_per_node:.0f}M" if memory else None,
        "dependency": after or None,
    }
    how = dataclasses.replace(cluster.slurm, options=without)
    parallelism = {"array_parallelism": how.array_parallelism or options.array}
    return profile_parameters(how, code, asked, Layout(1, 1)) | parallelism


def submit(options: argparse.Namespace, cluster: Cluster) -> Submission:
    """Submits the array, and the job that runs after all of it.

    Raises:
        ConfigError: sbatch rejects a job; its own message, and the field to change.
    """
    from launch.job.stage_job import PrepareJob

    code = take_snapshot(Path(cluster.runs))
    folders = [new_folder(options.output / "jobs", what) for what in ("check", "list")]
    shares = [(number, options.array) for number in range(options.array)]
    check = job_parameters(options, cluster, code, "check", "")
    array = call_sbatch(folders[0], check, [PrepareJob(options, share) for share in shares], "check")
    lists = job_parameters(options, cluster, code, "list", f"afterok:{array}")
    try:
        last = call_sbatch(folders[1], lists, [PrepareJob(options, (0, 1))], "list")
    except ConfigError as error:
        slurm.cancel([array])
        raise ConfigError(f"{error} (the array, job {array}, was cancelled)") from error
    return Submission(array, last, *folders)


def queued_jobs(output: Path) -> list[str]:
    """Jobs of earlier submissions for this folder that wait or run."""
    folders = {path.name.partition("_")[0]: str(path.parent) for path in output.glob("jobs/*/*_submission.sh")}
    found = {(job.partition("_")[0], entry.directory) for job, entry in slurm.queue(folders).items()}
    return sorted({job for job, directory in found if folders.get(job) == directory}, key=int)


def print_plan(options: argparse.Namespace, cluster: Cluster, argv: Sequence[str]) -> None:
    """Prints the two sbatch calls of a submission."""
    lines = []
    for name, size, after in (("check", options.array, ""), ("list", 1, "#1")):
        how = job_parameters(options, cluster, Path(), name, after)
        asked = how["additional_parameters"]
        where = asked.get("partition", "the cluster's default")
        limit = f"{how['time'] / 60:g} h"
        lines.append([asked["job_name"], str(size), str(options.workers), asked.get("mem", "-"), where, limit])
        lines[-1].append("all of check" if after else "-")
    columns = ["job", "jobs>", "cores>", "memory>", "partition", "time limit>", "after"]
    print_table("2 sbatch calls", columns, lines)
    again = [word for word in argv if word != "--dry-run"]
    print_next([("submit them", command("prepare.py", *again))])


def print_submission(options: argparse.Namespace, submission: Submission, argv: Sequence[str]) -> None:
    """Prints what was submitted, how to follow it, and what to do with the result."""
    array, last = submission.array, submission.last
    name = f"{array}[0-{options.array - 1}]" if options.array > 1 else array
    print(f"submitted to SLURM: {name} checks the videos, {last} then writes the lists into {short(options.output)}")
    log = short(submission.last_folder / f"{last}_0_log.out")
    print_next(
        [
            ("show the jobs in the queue", f"squeue --jobs {array},{last}"),
            done_so_far(options),
            ("read their logs", f"tail {shlex.quote(short(submission.array_folder))}/*_log.out"),
            ("cancel", f"scancel {array} {last}"),
            ("if a job has failed or was cancelled, continue", command("prepare.py", *argv)),
            ("once the last job has ended, show the counts and the lines for cluster.yaml", f"cat {shlex.quote(log)}"),
        ]
    )


def done_so_far(options: argparse.Namespace) -> tuple[str, str]:
    """The command that counts the files checked so far."""
    return "count the checked files", f"cat {shlex.quote(short(options.output))}/records*.jsonl | wc -l"


if __name__ == "__main__":
    sys.exit(run_command(main))
