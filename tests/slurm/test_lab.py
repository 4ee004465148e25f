"""The virtual cluster itself: the SLURM versions it is configured for, crashes of its nodes, and the sites' quirks."""

import contextlib
import errno
import socket
import subprocess

import pytest

from tests.slurm.lab import wait_for
from tests.slurm.lab.configuration import cgroup_configuration
from tests.slurm.lab.host import free_ports
from tests.slurm.lab.quirks import ERROR, clients_failing, controller_down, disk_full, port_taken, small_disk

NODE = "node4"


@pytest.fixture
def sleepers(lab):
    """Submit batch scripts that sleep on one node; they are cancelled at the end."""
    submitted = []

    def submit(count: int, command: str = "sleep 300", output: str = "/dev/null") -> list[str]:
        options = ("--parsable", "--requeue", "-w", NODE, "--mem=1", "-o", output, "--wrap", command)
        jobs = [lab.run("sbatch", *options).strip() for _ in range(count)]
        submitted.extend(jobs)
        wait_for("the jobs' start", lambda: set(states(lab, jobs).values()) == {"RUNNING"})
        return jobs

    yield submit
    lab.run("scancel", *submitted, check=False)
    wait_for("the jobs' end", lambda: not states(lab, submitted))


def states(lab, jobs: list[str]) -> dict[str, str]:
    """Job id -> state of those in the queue."""
    lines = [line.split() for line in lab.run("squeue", "-h", "-o", "%A %T").splitlines()]
    return {job: state for job, state in lines if job in jobs}


def attempts(lab, job: str) -> list[str]:
    """States of all attempts of a job in accounting, the first one first."""
    return lab.run("sacct", "-n", "-X", "-D", "-P", "-o", "state", "-j", job).split()


@pytest.mark.parametrize(
    ("version", "configuration"),
    [
        ("slurm-wlm 22.05.8", ""),
        ("slurm-wlm 21.08.5", ""),
        ("slurm 23.02.0-0rc1", "CgroupPlugin=disabled\n"),
        ("slurm-wlm 24.11.5", "CgroupPlugin=disabled\n"),
    ],
)
def test_cgroups_are_disabled_by_name_from_slurm_23_on(version, configuration):
    assert cgroup_configuration(version) == configuration


def test_an_unknown_version_string_is_refused():
    with pytest.raises(ValueError, match="got 'no version'"):
        cgroup_configuration("no version")


def test_slurm_sees_a_crashed_node_not_a_batch_script_that_died_by_a_signal(lab, sleepers):
    jobs = sleepers(12)
    lab.crash(NODE)
    try:
        under_way = {"PENDING", "RUNNING"}  # accounting lags behind
        wait_for("the end of the first attempts", lambda: not under_way & {attempts(lab, job)[0] for job in jobs})
        assert {attempts(lab, job)[0] for job in jobs} == {"NODE_FAIL"}
        assert states(lab, jobs) == dict.fromkeys(jobs, "PENDING")
    finally:
        lab.restart(NODE)
        wait_for("the nodes", lab.nodes_ready)


def test_a_running_job_outlives_a_restart_of_the_controller(lab, sleepers):
    (job,) = sleepers(1)
    with controller_down(lab):
        assert "is DOWN" in lab.run("scontrol", "ping", check=False)
    assert states(lab, [job]) == {job: "RUNNING"}
    wait_for("the job's start in accounting", lambda: attempts(lab, job) == ["RUNNING"])


def test_failing_commands_fail_for_the_user_and_in_jobs_and_work_again_afterwards(site, tmp_path):
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=site.environment, capture_output=True, text=True, timeout=60, check=False)

    log = tmp_path / "log"
    script = "until ! squeue; do sleep 0.1; done; touch failed; until squeue --version; do sleep 0.1; done"
    job = run(
        "sbatch", "--parsable", "--mem=1", f"--chdir={tmp_path}", f"--output={log}", "--wrap", script
    ).stdout.strip()
    with clients_failing(site.clients, "squeue"):
        failed = run("squeue", "--version")
        assert failed.returncode == 1 and failed.stderr == f"squeue: {ERROR}\n"
        assert run("scontrol", "--version").returncode == 0
        site.wait("the failure in the job", (tmp_path / "failed").exists, seconds=60)
    assert run("squeue", "--version").returncode == 0
    site.wait("the job's end", lambda: not site.queued(job), seconds=60)
    assert f"squeue: {ERROR}" in log.read_text() and log.read_text().splitlines()[-1].startswith("slurm")


def test_a_full_disk_has_room_again_afterwards(tmp_path):
    folder = tmp_path / "runs"
    with small_disk(folder, megabytes=1):
        (folder / "before").write_bytes(bytes(1000))
        with disk_full(folder):
            with pytest.raises(OSError, match="No space left") as raised:
                (folder / "during").write_bytes(bytes(1000))
            assert raised.value.errno == errno.ENOSPC
        (folder / "after").write_bytes(bytes(1000))
    assert not list(folder.iterdir())


def test_only_a_small_disk_is_filled(tmp_path):
    with pytest.raises(ValueError, match="must be a small_disk"), disk_full(tmp_path):
        pass


def test_a_taken_port_is_free_again_afterwards():
    (port,) = free_ports(1)
    with port_taken(port), contextlib.closing(socket.socket()) as own, pytest.raises(OSError, match="in use"):
        own.bind(("", port))
    with contextlib.closing(socket.socket()) as own:
        own.bind(("", port))
