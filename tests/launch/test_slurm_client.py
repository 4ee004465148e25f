"""The door to SLURM: what is asked, how answers are read, and how failures are met. tests/slurm asks a real SLURM."""

import os
from pathlib import Path

import pytest

from launch.job.record import Record, jobs_in_history, jobs_in_queue
from launch.slurm.client import BRIEF, PATIENT, SubmissionError, clean_environment, run_client, slurm
from mvd.config import ConfigError
from tests.launch.fake_slurm import BUSY

SCRIPT, FOLDER = Path("/runs/jobs/1/submission.sh"), Path("/runs/jobs/1")


def record(job, directory=None):
    return Record(job, "/runs/jobs/1", "2026-01-01", 1, [], [], directory=directory)


def test_what_a_shell_sets_for_slurm_does_not_reach_a_command(monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "a", "SLURM_JWT": "token", "PATH": "/bin", "MVD_X": "1"}
    names = ("SQUEUE_STATES", "SBATCH_PARTITION", "SBATCH_EXPORT", "SACCT_FORMAT", "SRUN_X", "SLURM_CPU_BIND")
    names += ("SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURMD_NODENAME", "MASTER_PORT", "MASTER_ADDR", "SCANCEL_STATE")
    assert clean_environment(kept | dict.fromkeys(names, "x")) == kept
    for name in names:
        monkeypatch.setenv(name, "x")
    shown = run_client(["env"]).out
    assert not [name for name in names if f"\n{name}=" in f"\n{shown}"] and "\nPATH=" in f"\n{shown}"
    assert os.environ["SLURM_JOB_ID"] == "x"


def test_a_command_that_is_missing_or_silent_is_an_answer(monkeypatch):
    missing = run_client(["no-such-client"])
    assert missing.message == "no-such-client cannot be run: No such file or directory" and not missing.passing
    monkeypatch.setattr("launch.slurm.client.SECONDS_TO_ANSWER", 0.2)
    silent = run_client(["sleep", "5"])
    assert silent.message == "sleep did not answer within 0.2 s" and silent.passing


def test_notices_around_an_answer_are_ignored(fake_slurm):
    fake_slurm.runs("24_1", directory="/a|b")
    fake_slurm.runs("25", "COMPLETING")
    fake_slurm.says("squeue", f"*** maintenance on Monday | 8:00 ***\n24_1|RUNNING\n{fake_slurm.table()}Bye.\n")
    found = slurm.queue(["24_1", "25", "26", "local-7"])
    assert set(found) == {"24_1", "25"} and found["24_1"].directory == "/a|b" and found["24_1"].runs
    assert found["25"].is_completing and not found["25"].runs
    assert fake_slurm.called("squeue")[0][-2:] == ("--jobs", "24,25,26")


def test_only_the_elements_that_were_asked_for_are_told(fake_slurm):
    for job in ("24_1", "24_2", "25_1"):
        fake_slurm.runs(job)
    assert set(slurm.queue(["24_1", "25"])) == {"24_1", "25_1"}


def test_only_the_steps_of_a_stages_processes_are_told(fake_slurm):
    steps = ("24.batch|batch", "24.extern|extern", "24.0|guard", "24.1|python", "24.2|python")
    fake_slurm.says("squeue", "".join(f"mvd|{step}\n" for step in steps))
    assert slurm.steps("24", but="guard") == ["24.1", "24.2"]


def test_an_answer_without_its_header_is_no_empty_queue(fake_slurm):
    fake_slurm.says("squeue", "the cluster is under maintenance\n")
    with pytest.raises(ConfigError, match="squeue does not answer"):
        slurm.queue(["24"])


def test_a_job_that_is_long_over_is_not_in_the_queue(fake_slurm):
    fake_slurm.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    assert slurm.queue(["24"]) == {} and fake_slurm.pauses == []
    assert slurm.queue(["local-7"]) == {} and len(fake_slurm.calls) == 1


def test_passing_failures_are_met_with_growing_pauses(fake_slurm, monkeypatch):
    fake_slurm.runs("24")
    fake_slurm.fails("squeue", times=2)
    assert "24" in slurm.queue(["24"]) and fake_slurm.pauses == list(BRIEF)
    fake_slurm.fails("squeue", times=len(BRIEF) + 1)
    with pytest.raises(ConfigError, match="Socket timed out"):
        slurm.queue(["24"])

    monkeypatch.setattr(slurm, "pauses", PATIENT)
    fake_slurm.pauses.clear()
    fake_slurm.fails("scontrol requeue", times=len(PATIENT))
    assert slurm.requeue("24") == "" and fake_slurm.pauses == list(PATIENT) and sum(PATIENT) > 240


def test_what_does_not_pass_is_not_retried(fake_slurm):
    fake_slurm.fails("scontrol requeue", "Requested operation is presently disabled for job 24")
    assert slurm.requeue("24") == "Requested operation is presently disabled for job 24"
    fake_slurm.fails("scancel", "scancel: error: Kill job error on job id 24: Access/permission denied")
    with pytest.raises(ConfigError, match="permission denied"):
        slurm.cancel(["24"])
    assert fake_slurm.pauses == []


@pytest.mark.parametrize(
    "printed",
    ["24\n", "24;cluster\n", "Submitted batch job 24\n", "sbatch: lua: your project is gpu\n\n24\nThank you, job 7!\n"],
)
def test_the_job_id_is_read_whatever_a_wrapper_prints(printed, fake_slurm):
    fake_slurm.says("sbatch", printed)
    assert slurm.submit(SCRIPT, FOLDER) == "24"
    assert fake_slurm.calls == [("sbatch", "--parsable", str(SCRIPT))]


@pytest.mark.parametrize(("code", "out", "error"), [(0, "ok, two jobs: 7\n", ""), (1, "", BUSY)])
def test_a_job_whose_id_was_not_told_is_found_and_not_submitted_again(code, out, error, fake_slurm):
    fake_slurm.runs("23", directory="/runs/jobs/0")
    fake_slurm.runs("24_0", "PENDING", directory=str(FOLDER))
    fake_slurm.runs("24_1", "PENDING", directory=str(FOLDER))
    fake_slurm.says("sbatch", out, error, code)
    assert slurm.submit(SCRIPT, FOLDER) == "24" and len(fake_slurm.called("sbatch")) == 1


def test_a_submission_that_slurm_did_not_hear_is_repeated(fake_slurm):
    fake_slurm.fails("sbatch", "sbatch: error: Batch job submission failed: Unable to contact slurm controller")
    assert slurm.submit(SCRIPT, FOLDER) == "101" and fake_slurm.pauses == [BRIEF[0]]
    fake_slurm.fails("sbatch", "sbatch: error: invalid partition specified: x")
    with pytest.raises(SubmissionError, match="invalid partition specified: x"):
        slurm.submit(SCRIPT, FOLDER)
    fake_slurm.says("sbatch", "hello\n")
    with pytest.raises(SubmissionError, match="sbatch printed no job id: 'hello'"):
        slurm.submit(SCRIPT, FOLDER)


def test_a_job_that_somebody_else_got_the_same_id_for_is_not_ours(fake_slurm):
    fake_slurm.runs("24", directory="/home/somebody")
    fake_slurm.history["25"] = ("FAILED", "/home/somebody")
    fake_slurm.history["26"] = ("CANCELLED by 0", "/runs/jobs/1")
    ours = [record(job, "/runs/jobs/1") for job in ("24", "25", "26")]
    assert jobs_in_queue(ours) == {}
    assert {job: entry.state for job, entry in jobs_in_history(ours).items()} == {"26": "CANCELLED"}
    before = record("24")  # of version 0.1, which did not record the directory
    assert set(jobs_in_queue([before])) == {"24"}


def test_the_sites_limits_are_read_once(fake_slurm, monkeypatch):
    fake_slurm.config |= {"MaxArraySize": "1001", "RequeueExit": "75,99"}
    assert slurm.largest_array() == 1001 and slurm.requeue_exit() == 75 and len(fake_slurm.calls) == 1
    monkeypatch.setattr(slurm, "_config", None)
    fake_slurm.fails("scontrol show config", "Access denied")
    assert slurm.largest_array() is None and slurm.requeue_exit() is None


@pytest.mark.parametrize(("shown", "preempted"), [("None", False), ("2026-11-25T03:00:00", True)])
def test_a_preemption_is_what_scontrol_says(shown, preempted, fake_slurm):
    fake_slurm.says("scontrol show job", f"JobId=24 PreemptEligibleTime=2026-11-25T01:00:00 PreemptTime={shown}\n")
    assert slurm.is_preempted("24") is preempted


def test_a_job_that_an_unanswered_sbatch_has_submitted_after_all_is_cancelled(fake_slurm, monkeypatch):
    def slept(_):
        fake_slurm.runs("99", "PENDING", directory=str(FOLDER))

    fake_slurm.fails("sbatch")
    monkeypatch.setattr(type(slurm), "sleep", staticmethod(slept))
    assert slurm.submit(SCRIPT, FOLDER) == "101"
    assert fake_slurm.called("scancel") == [("scancel", "99")]
