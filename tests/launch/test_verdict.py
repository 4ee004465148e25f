"""Why a job's processes ended: what SLURM and srun say, and which hosts are blamed for it."""

import json

import pytest

from launch.job.verdict import DeadTask, blame_dead_tasks, dead_tasks, explain_exit, step_state
from mvd.run_directory import RunDirectory

HEADER = "=== job 24, rank 0 on node1, 2026-11-24T10:00:00+00:00\n"


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        (137, "OUT_OF_MEMORY", "SLURM says OUT_OF_MEMORY: the job used more memory than it asked for; raise slurm.mem"),
        (143, "CANCELLED by 1000", "SLURM says CANCELLED by 1000: the job was cancelled"),
        (1, "NODE_FAIL", "SLURM says NODE_FAIL: a node of the job failed"),
        (137, "FAILED", "SIGKILL comes from the kernel if a host has no memory left, or from a person"),
        (139, "", "it was killed by SIGSEGV (Segmentation fault)"),
    ],
)
def test_an_exit_without_a_message_is_explained_by_slurm_or_by_its_signal(code, state, said):
    assert explain_exit(code, state).startswith(f"no process said why; {said}")


def test_an_exit_that_nothing_explains_is_said_to_be_one():
    assert explain_exit(1, "FAILED") == "no process said why"


@pytest.mark.parametrize(
    ("printed", "state"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=24.0. Some of the step tasks ...", "OUT_OF_MEMORY"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in step 24.0 cgroup. Some of ...", "OUT_OF_MEMORY"),
        ("srun: error: node1: task 0: Out Of Memory", "OUT_OF_MEMORY"),
        ("slurmstepd: error: *** STEP 24.0 ON node1 CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***", "TIMEOUT"),
        ("slurmstepd: error: *** JOB 24 ON node1 CANCELLED AT 2026-11-24T10:00:00 DUE TO PREEMPTION ***", "PREEMPTED"),
        (
            "slurmstepd: error: *** STEP 24.0 ON node1 CANCELLED AT 2026-11-24T10:00:00 DUE TO NODE FAILURE, SEE"
            " SLURMCTLD LOG FOR DETAILS ***",
            "NODE_FAIL",
        ),
        ("ValueError: no DUE TO TIME LIMIT", ""),
    ],
)
def test_slurms_verdict_on_the_last_attempt_is_in_the_jobs_log(tmp_path, printed, state):
    log = tmp_path / "log"
    log.write_text(f"{HEADER}{printed}\n")
    assert step_state(log) == state
    log.write_text(f"{HEADER}{printed}\n{HEADER}")
    assert step_state(log) == "" and step_state(tmp_path / "none") == ""


def test_srun_tells_which_tasks_a_signal_ended():
    log = (
        "srun: error: node3: task 5: Bus error (core dumped)\nsrun: error: gpu-a.x: tasks 8-11: Illegal instruction\n"
        "srun: error: node1: task 0: Exited with exit code 76\nsrun: error: node[1-2]: tasks 0,2: Bus error\n"
        "srun: error: Unable to create step\n"
    )
    assert dead_tasks(log) == [DeadTask("node3", 5, 7), DeadTask("gpu-a.x", 8, 4)]


def blamed(tmp_path, *logs: str) -> list[tuple[list[str], str]]:
    for rank, text in enumerate(logs):
        (tmp_path / f"log_{rank}").write_text(text)
    blame_dead_tasks(RunDirectory(tmp_path), lambda rank: tmp_path / f"log_{rank}")
    faults = RunDirectory(tmp_path).read_faults() if (tmp_path / "faults.jsonl").exists() else []
    return [(fault["hosts"], fault["message"]) for fault in faults]


def test_a_bus_error_blames_its_host(tmp_path):
    log = HEADER + "srun: error: node2: task 1: Bus error\n"
    assert blamed(tmp_path, log) == [(["node2"], "rank 1 on node2: bus error (SIGBUS)")]


def test_an_aborted_task_blames_its_host_if_its_log_shows_a_hardware_fault(tmp_path):
    log = HEADER + "srun: error: node2: task 1: Aborted (core dumped)\n"
    printed = HEADER + "terminate called after throwing\n  what():  CUDA error: uncorrectable ECC error encountered\n"
    assert blamed(tmp_path, log, printed) == [(["node2"], "rank 1 on node2: uncorrectable ECC error of a GPU's memory")]


@pytest.mark.parametrize(
    "log",
    [
        HEADER + "srun: error: node2: task 1: Segmentation fault\n",
        HEADER + "srun: error: node2: task 1: Killed\n",
        HEADER + "srun: error: node2: task 1: Aborted\n",
        HEADER + "srun: error: node2: task 1: Bus error\n=== a process ended with exit code 135\n" + HEADER,
    ],
    ids=["segfault", "killed", "aborted by a bug", "an earlier attempt's"],
)
def test_other_deaths_blame_no_host(tmp_path, log):
    printed = HEADER + "CUDA error: uncorrectable ECC\n=== next attempt\nRuntimeError: CUDA error: device-side assert\n"
    assert blamed(tmp_path, log, printed) == []


def test_a_job_without_logs_blames_no_host(tmp_path):
    assert blame_dead_tasks(RunDirectory(tmp_path), lambda rank: tmp_path / "none") is None
    assert not (tmp_path / "faults.jsonl").exists()


def test_a_blamed_host_is_recorded_as_a_hardware_fault(tmp_path):
    blamed(tmp_path, HEADER + "srun: error: node2: task 1: Illegal instruction\n")
    assert json.loads((tmp_path / "faults.jsonl").read_text())["fault"] == "hardware"
