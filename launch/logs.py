"""Prints or follows the log of a stage's newest attempt, by default of rank 0.

TARGET is a row (of its stages, the one that started last is shown), or the name of a run directory.
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
HEADER = "=== job "  # the first line of each attempt's log (launch.job.stage_job)


def main(argv: Sequence[str]) -> int:
    """Prints the log; returns the exit code."""
    parser = Parser("logs.py", __doc__ or "", EXAMPLES, takes_stages=True)
    parser.add_argument("--stage", choices=KINDS, metavar="KIND", help=f"only stages of this kind: {', '.join(KINDS)}")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank of the process (default: 0)")
    parser.add_argument("--follow", "-f", action="store_true", help="keep printing new lines until Ctrl-C")
    request = parser.read(argv)
    wanted = request.options.stage
    stages = [node.id for node in build_graph(request.rows) if wanted in (None, node.kind)] + request.stages
    record = newest(Path(request.cluster.runs), stages)
    if record is None:
        raise ConfigError(f"no stage of {' '.join(request.words)} was submitted or run yet; see status.py")
    path = record.log(request.options.rank)
    if not path.exists() and record.is_local:
        raise ConfigError(
            f"{path} does not exist: {record.job_id} had no rank {request.options.rank}, or ran in a version that kept "
            "no logs of --local"
        )
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: job {record.job_id} has not started, or has no rank {request.options.rank}"
        )
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
    """The record, of a job or of a --local run, whose newest attempt started last, or None."""
    folders = [files for stage in stages for files in RunDirectory(runs / stage).job_files()]
    records = [record for files in folders if (record := read_record(files))]
    started = [record for record in records if record.attempts]
    return max(started or records, key=lambda r: r.attempts[-1].started if r.attempts else r.submitted, default=None)


def newest_attempt(path: Path) -> int:
    """Line number, from 0, of the start of the last attempt in a log."""
    with open(path, errors="replace") as handle:
        return max((number for number, line in enumerate(handle) if line.startswith(HEADER)), default=0)


if __name__ == "__main__":
    sys.exit(run_command(main))
