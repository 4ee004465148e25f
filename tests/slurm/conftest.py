"""Fixtures: the virtual cluster, and a user of it with a runs folder of its own for each test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import ROOT
from launch.job.record import Record, read_record
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config.typed import parse_override
from mvd.run_directory import RunDirectory
from tests.slurm.lab import Lab, can_run, running_lab, wait_for
from tests.slurm.lab.quirks import wrap_clients

TINY = "tests/slurm/tiny"
LONG = "pretrain.optimization.epochs=20"
TWO_MINUTES = ("cluster.slurm.time_limit_hours=0.0334", "cluster.slurm.warning_seconds=45")
PROFILE = """
runs: {folder}/runs
nodes: 1
gpus_per_node: 1
test: {{nodes: 1, micro_batch: 4}}
precision: fp32
workers: 0
checkpoint_every: 100
validate_every: 100
log_every: 1
datasets: {{motion: {{root: {motion}}}}}
teachers: {{mae_tiny: {image_teacher}, videomae_tiny: {video_teacher}}}
slurm:
  partition: main
  cpus_per_gpu: 1
  memory_gb: 2
  environment:
    MVD_EXPECT_GPU: "0"
    OMP_NUM_THREADS: 1
    MVD_TEST_BRAKE: {folder}/brake
    MVD_TEST_WRONG: {folder}/wrong
    MVD_TEST_FAULT: {folder}/fault
    MVD_TEST_BAD: {folder}/bad
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The cluster of `make slurm-up` if there is one, otherwise one for this session."""
    if not can_run():
        pytest.skip("a virtual SLURM needs root on Debian or Ubuntu")
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


class Site:
    """A user of the cluster: a folder with a profile and runs, and the launcher's commands.

    clients: wrappers of SLURM's commands, first in the PATH of the user and so of the user's jobs; see lab/quirks.py.
    """

    def __init__(self, lab: Lab, folder: Path, motion: Path, teachers: dict[str, str]) -> None:
        self.lab, self.folder, self.runs = lab, folder, folder / "runs"
        self.brake, self.fault, self.bad = folder / "brake", folder / "fault", folder / "bad"
        self.wrong, self.profile = folder / "wrong", folder / "cluster.yaml"
        self.profile.write_text(PROFILE.format(folder=folder, motion=motion, **teachers))
        hooks = str(Path(__file__).with_name("hooks"))
        self.clients = folder / "bin"
        wrap_clients(self.clients, lab)
        path = os.pathsep.join((str(self.clients), lab.environment["PATH"]))
        own = {"MVD_CLUSTER": str(self.profile), "PYTHONPATH": hooks, "PATH": path}
        self.environment = os.environ | lab.environment | own

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "launch" / script), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, script: str, *words: str, code: int | None = 0) -> str:
        """Run a command of launch/; return all it prints. code: the exit code it must have, None for any."""
        with self.start(script, *words) as process:
            out, err = process.communicate(timeout=120)
        assert code in (None, process.returncode), out + err
        return out + err

    def submit(self, *words: str, code: int = 0) -> str:
        return self.run("submit.py", *words, code=code)

    def states(self, *words: str) -> dict[str, str]:
        """Stage id -> its state as status.py prints it."""
        table = self.run("status.py", *words)
        lines = [re.split(r"  +", line.strip()) for line in table.splitlines()]
        return {cells[1]: cells[2] for cells in lines if len(cells) > 3 and cells[1] != "stage"}

    def record(self, stage: str) -> Record:
        record = read_record(RunDirectory(self.runs / stage))
        assert record is not None
        return record

    def wait(self, what: str, condition, seconds: float = 300) -> None:
        try:
            wait_for(what, condition, seconds)
        except TimeoutError as error:
            logs = sorted(self.folder.glob("*/jobs/*/*.out"))
            tails = [f"{path}:\n{path.read_text()[-2000:]}" for path in logs]
            raise AssertionError("\n\n".join([str(error), self.lab.run("squeue"), *tails])) from error

    def wait_for_result(self, stage: str, seconds: float = 300) -> None:
        self.wait(f"the result of {stage}", (self.runs / stage / "result.json").exists, seconds)

    def wait_until_idle(self, seconds: float = 300) -> None:
        self.wait("the jobs' end", lambda: not self.queued(*self.jobs()), seconds)

    def jobs(self) -> list[str]:
        """Ids of all jobs that were submitted here, oldest first."""
        ids = {path.name.partition("_")[0] for path in self.folder.glob("*/jobs/*/*_submission.sh")}
        return sorted(ids, key=int)

    def queued(self, *jobs: str) -> dict[str, str]:
        """Job id -> state of those that are pending or running."""
        listed = self.lab.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        pairs = [line.split() for line in listed]
        return {job: state for job, state in pairs if job.partition("_")[0] in jobs}

    def account(self, *jobs: str) -> dict[str, str]:
        """Job id -> state in accounting, of the jobs that it knows already."""
        command = ("sacct", "-n", "-X", "-P", "-o", "jobid,state", "-j", ",".join(jobs))
        return dict(line.split("|") for line in self.lab.run(*command).splitlines())


@pytest.fixture(scope="session")
def new_site(lab, motion_root, teachers):
    def make(folder: Path) -> Site:
        return Site(lab, folder, motion_root, teachers)

    return make


@pytest.fixture
def site(new_site, tmp_path):
    """A user of this test's own; jobs still in the queue after the test are cancelled."""
    site = new_site(tmp_path)
    yield site
    end(site)


def end(site: Site) -> None:
    jobs = site.jobs()
    if jobs:
        site.lab.run("scancel", *jobs)
        site.wait("the cancelled jobs' end", lambda: not site.queued(*jobs))


def stage_ids(target: str, *settings: str) -> dict[str, list[str]]:
    """Kind -> stage ids of these rows."""
    found: dict[str, list[str]] = {}
    for node in build_graph(load_rows([target], [parse_override(text) for text in settings])):
        found.setdefault(node.kind, []).append(node.id)
    return found


@pytest.fixture(scope="session", autouse=True)
def limited(new_site, tmp_path_factory):
    """A stage that reaches its time limit again and again while the other tests run, and two stages that depend on it.

    SLURM checks the limits every 30 s, so the limit of two minutes takes effect after 45 to 75 s.
    """
    site = new_site(tmp_path_factory.mktemp("limited"))
    site.brake.touch()
    site.submit(TINY, LONG, *TWO_MINUTES, "--until", "finetune")
    yield site
    end(site)


@pytest.fixture(scope="session", autouse=True)
def stuck(new_site, tmp_path_factory):
    """A stage, and one that depends on it, whose start reaches its time limit again and again."""
    site = new_site(tmp_path_factory.mktemp("stuck"))
    site.fault.write_text("wait")
    where = "cluster.slurm.exclude=node[1-3]"  # the other tests expect both GPUs of node1 but one
    site.submit(TINY, *TWO_MINUTES, where, "--until", "finetune")
    yield site
    end(site)
