"""What may go wrong with a submission, and what submitting again does about it."""

import json
import shutil

import pytest

from tests.slurm.conftest import TINY, stage_ids

HELD = "cluster.slurm.options.hold=true"
IDS = stage_ids(TINY)
(PRETRAIN,) = IDS["pretrain"]


def test_a_failing_stage_ends_after_three_attempts_and_takes_its_children_along(site):
    site.fault.touch()
    site.submit(TINY)
    site.wait("the failure", lambda: site.record(PRETRAIN).error)
    site.wait_until_idle()
    record = site.record(PRETRAIN)
    assert len(record.attempts) == 3
    assert "3 attempts have saved nothing new" in record.error and "the fault that a test asked for" in record.error
    states = site.states(TINY)
    assert states[PRETRAIN] == "failed: RuntimeError: the fault that a test asked for; restarted in place 2 times"
    for kind, parents in (("finetune", [PRETRAIN] * 2), ("test", IDS["finetune"])):
        for stage, parent in zip(IDS[kind], parents, strict=True):
            assert states[stage].startswith(f"cancelled: its parent {parent} ")
    assert "the fault that a test asked for" in site.run("logs.py", TINY)

    site.fault.unlink()
    site.submit(TINY, "--until", "pretrain")
    site.wait_for_result(PRETRAIN)
    printed = site.submit(TINY, HELD)
    assert "complete already: 1 of 5" in printed and "pretrain-" not in printed
    assert site.states(TINY)[PRETRAIN].startswith("done")


def test_what_cannot_be_mended_by_another_attempt_fails_at_once(site):
    (site.folder / "empty").mkdir()
    for split in ("train", "val", "test"):
        (site.folder / "empty" / f"{split}.csv").touch()
    site.submit(TINY, f"cluster.datasets.motion.root={site.folder}/empty", "--until", "pretrain")
    site.wait("the failure", lambda: site.record(PRETRAIN).error)
    assert len(site.record(PRETRAIN).attempts) == 1
    assert "train.csv" in site.states(TINY)[PRETRAIN]


def test_submitting_twice_at_once_and_again_submits_each_stage_once(site):
    both = [site.start("submit.py", TINY, HELD) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("submitted to SLURM") for text in printed) == [0, 1]
    assert sorted(text.count("queued or running already") for text in printed) == [0, 5]
    assert len(list(site.runs.glob("jobs/*"))) == 3
    assert site.submit(TINY, HELD).count("queued or running already") == 5
    job = site.record(PRETRAIN).job_id
    assert site.states(TINY)[PRETRAIN] == "queued (JobHeldUser)"

    third = site.submit(TINY, "finetune.seed=7", HELD)
    assert f"queued or running already: {PRETRAIN}, job {job}" in third and f"afterok:{job}" in third

    printed = site.run("cancel.py", TINY)
    assert f"left alone: {PRETRAIN}; cancel what waits for it too: finetune-" in printed
    assert all(f"cancelled: {stage}" in printed for kind in ("finetune", "test") for stage in IDS[kind])
    printed = site.run("cancel.py", TINY, "finetune.seed=7")
    assert f"cancelled: {PRETRAIN}, job {job}" in printed
    assert not site.queued(job)
    site.wait("the account", lambda: site.account(job) == {job: "CANCELLED by 0"}, seconds=20)
    assert site.states(TINY)[PRETRAIN] == "cancelled"
    assert "nothing to cancel" in site.run("cancel.py", TINY)


@pytest.mark.parametrize(
    ("setting", "said", "field"),
    [
        ("slurm.partition=nowhere", "invalid partition specified: nowhere", "change slurm.partition"),
        ("slurm.memory_gb=9000000", "Memory specification can not be satisfied", "change slurm.memory_gb"),
        ("slurm.options.reservation=none", "Requested reservation is invalid", "change slurm.options"),
        ("slurm.constraint=a100", "Invalid feature specification", "change slurm.constraint"),
        ("slurm.options.nonsense=1", "unrecognized option '--nonsense=1'", "change slurm.options"),
    ],
)
def test_a_refusal_is_sbatchs_own_sentence_and_the_field_to_change(site, setting, said, field):
    printed = site.submit(TINY, f"cluster.{setting}", code=2)
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert said in printed and field in printed
    assert not list(site.runs.glob("*/job.json"))


def test_a_refusal_in_the_middle_loses_nothing(site):
    printed = site.submit(TINY, HELD, "cluster.test.nodes=5", code=2)  # there are four
    assert "sbatch refuses the test jobs (Node count specification invalid); change nodes" in printed
    assert "2 of 3 arrays are queued already; submit again" in printed
    printed = site.submit(TINY, HELD)
    assert printed.count("queued or running already") == 3
    tests = [site.record(stage) for stage in IDS["test"]]
    assert [record.job_id.partition("_")[2] for record in tests] == ["0", "1"]


def test_a_runs_folder_that_cannot_be_written_is_named(site):
    (site.folder / "file").touch()
    printed = site.submit(TINY, f"cluster.runs={site.folder}/file/runs", code=2)
    assert printed.startswith(f"error: runs: {site.folder}/file/runs cannot be written (Not a directory)")


def test_a_job_whose_code_is_gone_says_so(site, lab):
    site.submit(TINY, HELD)
    (code,) = (site.runs / "code").iterdir()
    note = json.loads((code / "snapshot.json").read_text())
    assert set(note) == {"commit", "diff"} and (code / "mvd" / "run.py").exists()
    shutil.rmtree(code)
    lab.run("scontrol", "release", site.record(PRETRAIN).job_id)
    site.wait("the end of the job", lambda: not site.queued(site.record(PRETRAIN).job_id))
    assert f"{code}, the code of this job, is gone; submit it again" in site.states(TINY)[PRETRAIN]
