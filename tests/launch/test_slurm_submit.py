"""What submitting a plan makes of SLURM's answers, which are stood in for; see tests/slurm/test_submission.py."""

import errno
import json
from pathlib import Path

import pytest

from launch import status, submit
from launch.job.record import read_record, write_record
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from launch.slurm import submit as slurm_submit
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
from tests.launch.fake_slurm import BUSY

IDS = [node.id for node in build_graph(load_rows(["demo"], []))]


@pytest.fixture
def words(profile, tmp_path, fake_slurm):
    """The demo, its data set being there already."""
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "test.csv").touch()
    return ["demo", f"cluster.datasets.motion.root={tmp_path / 'motion'}"]


@pytest.fixture
def record(tmp_path):
    return lambda stage=IDS[0]: read_record(RunDirectory(tmp_path / "runs" / stage))


def queue(fake_slurm, record, state="PENDING"):
    """Puts what was submitted into the queue."""
    for stage in IDS:
        fake_slurm.runs(record(stage).job_id, state, directory=record(stage).directory)


def test_what_is_queued_is_not_submitted_again(words, fake_slurm, record, capsys):
    assert submit.main(words) == 0
    calls = len(fake_slurm.called("sbatch"))
    assert record().job_id == "101" and record().directory == record().folder
    queue(fake_slurm, record)
    assert submit.main(words) == 0
    assert len(fake_slurm.called("sbatch")) == calls
    assert capsys.readouterr().out.count("queued or running already") == len(IDS)


def test_a_queued_child_of_a_stage_that_is_submitted_again_waits_for_the_new_job(words, fake_slurm, record, capsys):
    assert submit.main(words) == 0
    queue(fake_slurm, record)
    first, child = record(), record(IDS[-1])
    del fake_slurm.queue[first.job_id]  # it has failed, and nothing has cancelled its children
    assert submit.main(words) == 0
    assert ("scancel", child.job_id) in fake_slurm.called("scancel")
    assert f"cancelled: {IDS[-1]}, job {child.job_id}, since the stage that it" in capsys.readouterr().out
    assert record().job_id != first.job_id and record(IDS[-1]).job_id != child.job_id


def test_a_student_that_has_failed_is_submitted_again_while_its_job_goes_on(words, fake_slurm, record, tmp_path):
    assert submit.main(words) == 0
    queue(fake_slurm, record)
    student = next(stage for stage in IDS if record(stage).together)
    failed = record(student)
    (other,) = failed.together
    failed.error = "the loss was not finite"
    write_record(RunDirectory(tmp_path / "runs" / student), failed)
    assert submit.main(words) == 0
    assert record(student).job_id != failed.job_id and record(other).job_id == failed.job_id


def test_a_stage_that_completes_while_slurm_is_asked_is_left_alone_with_its_children(
    words, fake_slurm, record, monkeypatch, capsys
):
    assert submit.main(words) == 0
    queue(fake_slurm, record)
    before, ask = {stage: record(stage).job_id for stage in IDS}, slurm_submit.jobs_in_queue
    capsys.readouterr()

    def complete_and_ask(records):
        RunDirectory(Path(record().directory).parents[1] / IDS[0]).result.write_text('{"epochs": 1}')
        fake_slurm.queue.pop(before[IDS[0]], None)
        return ask(records)

    monkeypatch.setattr(slurm_submit, "jobs_in_queue", complete_and_ask)
    assert submit.main(words) == 0
    assert {stage: record(stage).job_id for stage in IDS} == before and not fake_slurm.called("scancel")
    assert f"complete already: 1 of {len(IDS)} stages" in capsys.readouterr().out


def test_a_job_that_is_completing_is_waited_for(words, fake_slurm, record, monkeypatch, capsys):
    def end(_):
        fake_slurm.queue.clear()

    assert submit.main(words) == 0
    first = record().job_id
    queue(fake_slurm, record, "COMPLETING")
    monkeypatch.setattr(slurm_submit.time, "sleep", end)
    assert submit.main(words) == 0
    printed = capsys.readouterr().out
    assert "waiting for the end of job 101, 102" in printed and "queued or running already" not in printed
    assert int(record().job_id) > int(first)


def test_a_job_that_stays_completing_is_reported(words, fake_slurm, record, monkeypatch):
    assert submit.main(words) == 0
    queue(fake_slurm, record, "COMPLETING")
    monkeypatch.setattr(slurm_submit, "SECONDS_FOR_CLEANUP", 0)
    with pytest.raises(ConfigError, match="has ended, but SLURM is still COMPLETING it; submit again when it is gone"):
        submit.main(words)


def test_a_silent_squeue_submits_nothing(words, fake_slurm):
    assert submit.main(words) == 0
    calls = len(fake_slurm.called("sbatch"))
    fake_slurm.fails("squeue", times=3)
    with pytest.raises(ConfigError, match="squeue does not answer .*Socket timed out"):
        submit.main(words)
    assert len(fake_slurm.called("sbatch")) == calls


def test_the_record_is_there_before_anything_else_is_asked_of_slurm(words, tmp_path, fake_slurm, record):
    """The job may start at once, and looks for it."""
    fault = {"time": "2999-01-01T00:00:00+00:00", "fault": "hang", "update": 1, "hosts": ["node2"], "message": "x"}
    (tmp_path / "runs" / IDS[0]).mkdir(parents=True)
    (tmp_path / "runs" / IDS[0] / "faults.jsonl").write_text(json.dumps(fault) + "\n")
    assert submit.main(words) == 0
    names = ["test" if "--test-only" in call else call[0] for call in fake_slurm.calls]
    assert names.index("test") < names.index("sbatch") and "test" not in names[names.index("sbatch") :]
    assert record().avoided == ["node2"] and "#SBATCH --exclude=node2" in record().script.read_text()


def test_a_job_whose_record_cannot_be_written_is_cancelled(words, fake_slurm, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "job.json")

    monkeypatch.setattr(slurm_submit, "write_record", full)
    with pytest.raises(ConfigError, match="job.json: No space left on device; job 101 is cancelled again"):
        submit.main(words)
    assert fake_slurm.called("scancel") == [("scancel", "101")]


def test_a_disk_that_fails_between_two_arrays_says_what_is_queued(words, fake_slurm, monkeypatch):
    write = slurm_submit.write_text

    def fail(path, text):
        if IDS[-1] in str(path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
        write(path, text)

    monkeypatch.setattr(slurm_submit, "write_text", fail)
    with pytest.raises(ConfigError, match=r"stage.yaml: Disk quota exceeded \([1-9] of \d arrays are queued already"):
        submit.main(words)


def test_arrays_are_no_larger_than_the_site_allows(words, fake_slurm, record):
    fake_slurm.config["MaxArraySize"] = "1"
    seeds = [*words, "cluster.test_shards=2"]
    with pytest.raises(ConfigError, match="test_shards is 2, but this site's arrays have at most 1 elements"):
        submit.main(seeds)
    assert fake_slurm.called("sbatch") == []
    assert submit.main(words) == 0
    assert all("_" not in record(stage).job_id for stage in IDS)


def test_a_site_that_does_not_tell_its_limits_is_no_error(words, fake_slurm, record):
    fake_slurm.fails("scontrol show config", "Access denied")
    assert submit.main(words) == 0 and record().requeue_exit is None


def test_the_exit_code_upon_which_the_site_requeues_is_recorded(words, fake_slurm, record):
    fake_slurm.config["RequeueExit"] = "99"
    assert submit.main(words) == 0 and record().requeue_exit == 99


def test_watching_goes_on_when_squeue_fails(words, fake_slurm, monkeypatch, capsys):
    assert submit.main(words) == 0
    turns = []

    def sleep(_):
        turns.append(1)
        if len(turns) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    fake_slurm.fails("squeue", times=3)
    assert status.main([*words, "--watch"]) == 130
    printed = capsys.readouterr().out
    assert f"{BUSY}); try again when SLURM is back; next try in 30 s" in printed and f"{len(IDS)} stages" in printed
    fake_slurm.fails("squeue", times=3)
    with pytest.raises(ConfigError, match="squeue does not answer"):
        status.main(words)
