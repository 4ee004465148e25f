"""What a process of a job does at its start, and says of its end."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest
from submitit.helpers import TorchDistributedEnvironment

from launch.cluster import ROOT
from launch.job import stage_job
from launch.job.rendezvous import free_port
from launch.job.stage_job import ErrorNote, PrepareJob, export_job, run, use_nodes_of_step, wait_for_owner
from mvd import run as run_module
from mvd.config import ConfigError
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import HostFault
from mvd.owner import VARIABLE, Owner, take
from mvd.run_directory import RunDirectory


@pytest.fixture
def note(tmp_path):
    return ErrorNote([RunDirectory(tmp_path)], rank=0)


def owner(attempt):
    return Owner("24", attempt, "node1", "2026-01-01", port=12345)


def test_a_full_disk_is_one_sentence_and_another_attempt_is_made(note, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/metrics.jsonl")

    monkeypatch.setattr(run_module, "run_stage", full)
    with pytest.raises(SystemExit) as left:
        run([None], note)
    said = "error: /runs/metrics.jsonl: No space left on device; fix that, then submit the row again"
    assert left.value.code == 2 and said in capsys.readouterr().err
    written = json.loads(note.folders[0].error.read_text())
    assert written["lines"] == said and not written["final"]


def test_a_host_fault_is_one_sentence_and_another_attempt_is_made(tmp_path, monkeypatch, capsys):
    def broken(_):
        raise HostFault("rank 3 on node2: no usable GPU")

    monkeypatch.setattr(run_module, "run_stage", broken)
    with pytest.raises(SystemExit) as left:
        run([None], ErrorNote([RunDirectory(tmp_path)], rank=3))
    said = "error: rank 3 on node2: no usable GPU"
    assert left.value.code == RETRYABLE and capsys.readouterr().err == f"{said}\n"
    note = json.loads((tmp_path / "error.json").read_text())
    assert note["lines"] == said and not note["final"]


@pytest.mark.parametrize(("profile", "expected"), [(None, "1"), ("0", "0")])
def test_a_job_tells_training_its_hosts_and_that_it_asked_for_gpus(monkeypatch, profile, expected):
    variables = {"SLURM_JOB_ID": "24", "SLURM_JOB_NODELIST": "gpu[01-02],fat7", "SUBMITIT_EXECUTOR": "slurm"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MVD_HOSTS", "of an outer job")
    monkeypatch.setenv("MVD_EXPECT_GPU", profile or "")
    if profile is None:
        monkeypatch.delenv("MVD_EXPECT_GPU")
    export_job()
    assert (os.environ["MVD_HOSTS"], os.environ.pop("MVD_EXPECT_GPU")) == ("gpu01,gpu02,fat7", expected)


def test_training_sees_the_nodes_of_its_step_not_the_spare_ones(monkeypatch):
    variables = {"SLURM_JOB_ID": "24", "SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "4"}
    variables |= {"SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    variables |= {"SLURM_STEP_NODELIST": "node[2-3]", "SLURM_STEP_NUM_NODES": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MVD_HOSTS", "")
    monkeypatch.setenv("MVD_EXPECT_GPU", "0")
    use_nodes_of_step()
    export_job()
    found = TorchDistributedEnvironment()
    assert os.environ["MVD_HOSTS"] == "node2,node3"
    assert (found.master_addr, found.local_world_size, found.world_size) == ("node2", 2, 4)


def test_a_note_that_cannot_be_written_is_no_further_error(tmp_path, capsys):
    ErrorNote([RunDirectory(tmp_path / "missing")], rank=0).write("error: no matter")
    assert "cannot be written" in capsys.readouterr().err


def test_only_the_first_process_to_fail_is_noted(note, capsys):
    note.write("ValueError: the cause")
    note.write("ConnectionError: the effect")
    assert json.loads(note.folders[0].error.read_text())["lines"] == "ValueError: the cause"
    assert "another process has failed before this one" in capsys.readouterr().err


def test_a_process_whose_attempt_was_replaced_leaves_no_note(note, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "24.0.0")
    take(note.folders[0], owner(attempt=1), lambda _: False)
    note.write("error: no matter", final=True)
    assert not note.folders[0].error.exists()
    assert "no longer belongs to this attempt (24.0.0), but to job 24, attempt 2" in capsys.readouterr().err


def test_a_process_waits_for_its_attempts_record(note, monkeypatch):
    def slept(_):  # a network disk shows the other node's record late
        take(note.folders[0], owner(attempt=1), lambda _: False)

    monkeypatch.setenv(VARIABLE, "24.1.0")
    monkeypatch.setattr(stage_job.time, "sleep", slept)
    take(note.folders[0], owner(attempt=0), lambda _: False)
    assert wait_for_owner(note.folders) == owner(attempt=1)


def test_a_process_of_another_attempt_does_not_start(note, monkeypatch):
    monkeypatch.setenv(VARIABLE, "25.0.0")
    monkeypatch.setattr(stage_job, "SECONDS_FOR_OWNER", 0)
    take(note.folders[0], owner(attempt=0), lambda _: False)
    with pytest.raises(ConfigError, match="does not belong to job 25.0.0 but to job 24, attempt 1, on node1"):
        wait_for_owner(note.folders)


def test_a_rendezvous_port_is_free_and_not_the_kernels(tmp_path):
    (tmp_path / "range").write_text("10100\t65535\n")
    first = free_port(tmp_path / "range")
    with socket.create_server(("", first)):
        ports = {free_port(tmp_path / "range") for _ in range(50)}
    assert first in range(10000, 10100) and ports <= set(range(10000, 10100)) - {first} and len(ports) > 5
    (tmp_path / "range").write_text("1024 65535\n")  # leaves none
    assert free_port(tmp_path / "range") > 0
    assert not 32_768 <= free_port(tmp_path / "missing") <= 60_999


def test_a_share_of_preparing_requeues_its_job_when_told_to_stop(fake_slurm, monkeypatch, capsys):
    left = []
    monkeypatch.setenv("SLURM_JOB_ID", "24")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(os, "_exit", left.append)
    fake_slurm.fails("scontrol requeue", times=4)
    PrepareJob(None, (0, 1)).requeue()
    assert left == [75] and len(fake_slurm.called("scontrol requeue")) == 5
    assert "=== requeued" in capsys.readouterr().err


def test_the_hooks_of_the_batch_script_do_not_import_torch():
    code = "import sys, launch.job.attempts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
