"""What a process of a job says of its end."""

import errno
import json
import os

import pytest

from launch.job.stage_job import ErrorNote, export_job, run
from mvd import run as run_module
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import HostFault


def test_a_full_disk_is_one_sentence_and_another_attempt_is_made(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/metrics.jsonl")

    monkeypatch.setattr(run_module, "run_stage", full)
    with pytest.raises(SystemExit) as left:
        run(None, ErrorNote(tmp_path / "error.json", rank=0))
    said = "error: /runs/metrics.jsonl: No space left on device; mend that, then submit the row again"
    assert left.value.code == 2 and said in capsys.readouterr().out
    note = json.loads((tmp_path / "error.json").read_text())
    assert note["lines"] == said and not note["final"]


def test_a_host_fault_is_one_sentence_and_another_attempt_is_made(tmp_path, monkeypatch, capsys):
    def broken(_):
        raise HostFault("rank 3 on node2: no usable GPU")

    monkeypatch.setattr(run_module, "run_stage", broken)
    with pytest.raises(SystemExit) as left:
        run(None, ErrorNote(tmp_path / "error.json", rank=3))
    said = "error: rank 3 on node2: no usable GPU"
    assert left.value.code == RETRYABLE and capsys.readouterr().out == f"{said}\n"
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


def test_a_note_that_cannot_be_written_is_no_further_error(tmp_path, capsys):
    ErrorNote(tmp_path / "missing" / "error.json", rank=0).write("error: no matter")
    assert "cannot be written" in capsys.readouterr().out
