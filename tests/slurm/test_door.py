"""What a user's shell, a second submission and a reused job id must not do to a job."""

import json
import os
import signal
import socket

from launch.job.record import write_record
from launch.job.rendezvous import EPHEMERAL
from mvd.owner import read_owner
from mvd.run_directory import RunDirectory
from tests.slurm.conftest import TINY, stage_ids

HELD = "cluster.slurm.options.hold=true"
ALONE = ("--until", "pretrain")
(PRETRAIN,) = stage_ids(TINY)["pretrain"]
SHELL = {  # as set by hand, by `srun --pty` and in an element of an array
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_PARTITION": "high",
    "SQUEUE_FORMAT": "%i",
    "SACCT_FORMAT": "jobid",
    "SBATCH_PARTITION": "high",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_EXPORT": "NONE",
    "SLURM_CPU_BIND": "map_cpu:0",
    "SLURM_JOB_ID": "1",
    "SLURM_ARRAY_JOB_ID": "1",
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_RESTART_COUNT": "3",
}


def test_a_shells_settings_a_set_e_and_a_taken_port_change_nothing(site, lab):
    with socket.create_server(("", 0)) as taken:
        site.environment |= SHELL | {"MASTER_PORT": str(taken.getsockname()[1])}
        site.brake.touch()
        setup = "cluster.slurm.setup=['set -euo pipefail']"
        site.submit(TINY, HELD, setup, *ALONE)
        assert "queued or running already" in site.submit(TINY, HELD, setup, *ALONE)
        assert site.states(TINY)[PRETRAIN] == "queued (JobHeldUser)"
        job = site.record(PRETRAIN).job_id
        assert len(site.jobs()) == 1
        assert lab.run("squeue", "-h", "-j", job, "-o", "%P %l").split() == ["main", "1-00:00:00"]

        lab.run("scontrol", "release", job)
        site.wait("the first attempt", site.brake.with_suffix(".reached").exists)
        first = read_owner(RunDirectory(site.runs / PRETRAIN))
        os.kill(lab.tasks(job)[0], signal.SIGKILL)
        site.wait("the requeue", lambda: len(site.record(PRETRAIN).attempts) == 2)
        site.brake.unlink()
        site.wait_for_result(PRETRAIN)
    low, high = map(int, EPHEMERAL.read_text().split())
    assert first.name == f"{job}.0.0" and not low <= first.port <= high
    provenance = json.loads((site.runs / PRETRAIN / "provenance.json").read_text())
    assert [entry["slurm"]["SLURM_JOB_ID"] for entry in provenance] == [job, job]
    site.wait("the end of the job", lambda: read_owner(RunDirectory(site.runs / PRETRAIN)) is None)


def test_a_second_owner_of_a_run_directory_is_refused(site, lab):
    site.brake.touch()
    site.submit(TINY, *ALONE)
    files = RunDirectory(site.runs / PRETRAIN)
    first = site.record(PRETRAIN)
    site.wait("the first job", site.brake.with_suffix(".reached").exists)
    files.job.unlink()  # as if submitted from a machine that does not see the first job's record
    site.submit(TINY, *ALONE)
    second = site.record(PRETRAIN)
    assert second.job_id != first.job_id
    site.wait("the end of the second job", lambda: second.job_id not in site.queued(second.job_id))
    belongs = f"{files.path} belongs to job {first.job_id}, attempt 1, on node"
    assert belongs in second.log().read_text() and site.record(PRETRAIN).attempts == []
    assert f"failed: error: {belongs}" in site.states(TINY)[PRETRAIN]
    assert belongs in site.submit(TINY, "--local", *ALONE, code=2)

    write_record(files, site.record(PRETRAIN))
    site.brake.unlink()
    site.wait_for_result(PRETRAIN)
    site.wait("the end of the first job", lambda: read_owner(files) is None)
    site.wait("both jobs to leave the queue", lambda: not site.queued(first.job_id, second.job_id))


def test_a_job_that_slurm_gave_the_same_id_is_left_alone(site, lab):
    site.submit(TINY, HELD, *ALONE)
    record = site.record(PRETRAIN)
    site.run("cancel.py", TINY)
    foreign = lab.run("sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "sleep 1").strip()
    try:
        record.job_id = foreign
        write_record(RunDirectory(site.runs / PRETRAIN), record)
        assert site.states(TINY)[PRETRAIN] == "failed: its job has left the queue"
        site.run("cancel.py", TINY)
        assert site.queued(foreign) == {foreign: "PENDING"}
        assert "submitted to SLURM" in site.submit(TINY, HELD, *ALONE)
    finally:
        lab.run("scancel", foreign)


def test_a_cancelled_job_that_is_still_ending_does_not_count_as_queued(site):
    site.brake.touch()
    site.submit(TINY, *ALONE)
    site.wait("the job", site.brake.with_suffix(".reached").exists)
    first = site.record(PRETRAIN).job_id
    site.run("cancel.py", TINY)
    assert "queued or running already" not in site.submit(TINY, HELD, *ALONE)
    assert site.record(PRETRAIN).job_id != first
