"""Checks, in seconds and without a GPU, whether the cluster profile fits this site: SLURM, runs folder, data, teachers.

Run it on a login node before the first submission. With a TARGET it also asks SLURM whether it would accept the jobs of
these rows. With --job it submits a job of one node for a minute, which checks a compute node.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.checks.finding import Finding, examine
from launch.checks.folders import check_runs_folder, file_system
from launch.checks.inputs import check_inputs, needed_inputs
from launch.checks.node_job import run_test_job
from launch.checks.site import check_site, check_test_submission
from launch.cli.output import command, print_next
from launch.cli.parser import Parser, Request, run_command
from launch.cluster import Cluster
from launch.plan.arrays import Array, build_arrays
from launch.plan.graph import Node, build_graph
from launch.plan.resolve import build_stage, missing_settings
from launch.slurm.client import slurm
from launch.slurm.sbatch import write_script
from launch.slurm.script import parameters
from mvd.config import ConfigError
from mvd.distributed.exit_codes import INVALID, OK

EXAMPLES = """examples:
  python launch/doctor.py                              the profile against this site
  python launch/doctor.py experiments/vith_k400        and the jobs of a row
  python launch/doctor.py --job                        and a compute node, by a job of a minute
"""
MINUTES = 10  # that a test job may wait in the queue


def main(argv: Sequence[str]) -> int:
    """Prints one line per check; returns 0 if all are ok, else 2."""
    parser = Parser("doctor.py", __doc__ or "", EXAMPLES)
    parser.add_argument("--job", action="store_true", help="also check a compute node, by a job of one minute")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, metavar="N", help="wait for that job (default: %(default)s)"
    )
    request = parser.read(argv, needs_target=False)
    bad = 0
    for finding in findings(request):
        bad += not finding.ok
        print(f"{'ok ' if finding.ok else 'FIX'}  {finding.subject}: {finding.text}", flush=True)
    print(f"\n{bad} to fix" if bad else "\nall checks passed")
    words = request.words or ["experiments/demo"]
    steps = [("look at the plan", command("submit.py", *words, "--dry-run"))]
    if not request.options.job:
        steps.append(("check a compute node too", command("doctor.py", *request.words, "--job")))
    print_next(steps)
    return INVALID if bad else OK


def findings(request: Request) -> Iterator[Finding]:
    """All checks, the quick ones first."""
    cluster = request.cluster
    yield examine("Python of the jobs", lambda: _check_python(cluster))
    yield examine("runs folder", lambda: check_runs_folder(Path(cluster.runs), cluster.nodes))
    nodes = build_graph(request.rows)
    yield from check_inputs(cluster, needed_inputs(nodes) if nodes else None)
    if nodes:
        yield examine("settings of the rows", lambda: _check_settings(missing_settings(nodes, cluster)))
    site = list(check_site(cluster, slurm))
    yield from site
    if not all(finding.ok for finding in site[:2]):  # no clients, or no answer
        if request.options.job:
            yield Finding("compute node", False, "not checked, since SLURM does not answer; fix that first")
        return
    yield from _check_jobs(nodes, cluster)
    if request.options.job:
        yield from run_test_job(cluster, request.options.minutes)


def _check_python(cluster: Cluster) -> str:
    """Jobs run the Python that submits them; its version is checked at installation."""
    where = file_system(Path(sys.executable))
    shared = "" if cluster.nodes == 1 else f" on {where}; it must exist on every node (--job checks one)"
    return f"{sys.executable}, Python {sys.version.split()[0]}{shared}"


def _check_jobs(nodes: Sequence[Node], cluster: Cluster) -> Iterator[Finding]:
    """Whether SLURM would accept one job of each shape."""
    try:
        arrays = build_arrays(nodes, [build_stage(node, cluster) for node in nodes], {}, cluster)
    except ConfigError as error:
        yield Finding("jobs of the rows", False, str(error))
        return
    shapes = {(array.stages[0].kind, array.layout): array for array in arrays}
    for (kind, layout), array in shapes.items():
        yield examine(f"a {kind} job of {layout} GPUs", partial(_check_array, array, cluster))


def _check_settings(missing: Sequence[str]) -> str:
    if missing:
        raise ConfigError(f"the cluster profile must set {'; '.join(missing)}")
    return "all data sets and teachers are set"


def _check_array(array: Array, cluster: Cluster) -> str:
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=cluster.runs) as folder:
        how = parameters(array, cluster, Path(folder), Path(folder), "", cluster.slurm.excluded)
        return check_test_submission(write_script(Path(folder), how, 1), slurm)


if __name__ == "__main__":
    sys.exit(run_command(main))
