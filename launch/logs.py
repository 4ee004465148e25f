"""Prints what a stage's newest attempt has printed, or follows it; of rank 0 unless told otherwise.

TARGET is a row, of which the stage that runs, or ran last, is taken, or a stage by its run directory's name.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.parser import Parser, run_command
from launch.job.record import Record, read_record
from launch.plan.graph import build_graph
from mvd.config import KINDS, ConfigError
from mvd.run_directory import RunDirectory

EXAMPLES = """examples:
  python launch/logs.py experiments/vith_k400
  python launch/logs.py experiments/vith_k400 --stage pretrain --follow
  python launch/logs.py pretrain-vith_from_vith_e800-1a2b3c4d --rank 5
"""
HEADER = "=== job "  # a process's first line, see launch.job.stage_job


def main(argv: Sequence[str]) -> int:
    """Prints the log; returns the exit code."""
    parser = Parser("logs.py", __doc__ or "", EXAMPLES, takes_stages=True)
    parser.add_argument("--stage", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="of this process (default: 0)")
    parser.add_argument("--follow", "-f", action="store_true", help="go on printing what is added, until Ctrl-C")
    request = parser.read(argv)
    wanted = request.options.stage
    named = [node.id for node in build_graph(request.rows) if wanted in (None, node.kind)] + request.stages
    record = newest(Path(request.cluster.runs), named)
    if record is None:
        raise ConfigError(f"nothing of {' '.join(request.words)} has been submitted to SLURM; see status.py")
    path = record.log(request.options.rank)
    if not path.exists():
        raise ConfigError(f"there is no {path} yet: job {record.job_id} has not started, or has no such rank")
    print(f"{path}:", flush=True)
    start = newest_attempt(path)
    if request.options.follow:
        try:
            return subprocess.run(["tail", "-n", f"+{start + 1}", "-F", str(path)], check=False).returncode
        except KeyboardInterrupt:
            return 130
    with open(path, errors="replace") as handle:
        for number, line in enumerate(handle):
            if number >= start:
                print(line, end="")
    return 0


def newest(runs: Path, stages: Sequence[str]) -> Record | None:
    """The record whose newest attempt started last."""
    folders = [files for stage in stages for files in RunDirectory(runs / stage).job_files()]
    records = [record for files in folders if (record := read_record(files)) and not record.is_local]
    started = [record for record in records if record.attempts]
    return max(started or records, key=lambda r: r.attempts[-1].started if r.attempts else r.submitted, default=None)


def newest_attempt(path: Path) -> int:
    """The line, from 0, at which the last attempt in a log begins."""
    with open(path, errors="replace") as handle:
        return max((number for number, line in enumerate(handle) if line.startswith(HEADER)), default=0)


if __name__ == "__main__":
    sys.exit(run_command(main))
