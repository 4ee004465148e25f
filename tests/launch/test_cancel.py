"""Which jobs cancel.py cancels, and what it says; SLURM is stood in for. For students of one job: test_students.py."""

import os

import pytest

from launch import cancel, status, submit
from launch.job.record import read_record
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.run_directory import RunDirectory

DEMO = build_graph(load_rows(["demo"], []))


@pytest.fixture
def runs(profile, tmp_path, fake_slurm):
    """The demo's runs folder, all of whose stages are queued."""
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "test.csv").touch()
    assert submit.main(["demo", f"cluster.datasets.motion.root={tmp_path / 'motion'}"]) == 0
    for node in DEMO:
        record = read_record(RunDirectory(tmp_path / "runs" / node.id))
        fake_slurm.runs(record.job_id, "PENDING", directory=record.directory)
    return tmp_path / "runs"


def stage_of(kind):
    return next(node.id for node in DEMO if node.kind == kind)


def job_of(runs, stage):
    return read_record(RunDirectory(runs / stage)).job_id


@pytest.mark.parametrize("form", ["{stage}", "{stage}/", "{runs}/{stage}", "runs/{stage}"])
def test_a_run_directory_may_be_given_by_its_name_or_as_a_path(runs, fake_slurm, capsys, monkeypatch, form):
    monkeypatch.chdir(runs.parent)
    stage = stage_of("test")
    word = form.format(stage=stage, runs=runs)
    assert cancel.main([word]) == 0
    assert f"cancelled: {stage}, job {job_of(runs, stage)}" in capsys.readouterr().out
    assert fake_slurm.called("scancel") == [("scancel", job_of(runs, stage))]
    assert status.main([word]) == 0
    assert capsys.readouterr().out.startswith("1 stage ")


def test_a_run_directory_may_be_a_link_to_another_disk(runs, fake_slurm, tmp_path):
    stage = stage_of("test")
    job = job_of(runs, stage)
    os.renames(runs / stage, tmp_path / "big" / "disk" / stage)
    (runs / stage).symlink_to(tmp_path / "big" / "disk" / stage)
    assert cancel.main([stage]) == 0 and fake_slurm.called("scancel") == [("scancel", job)]


def test_a_directory_elsewhere_is_no_run_directory(runs, tmp_path, launch):
    other = tmp_path / "elsewhere" / stage_of("test")
    os.renames(runs / stage_of("test"), other)
    done = launch("cancel.py", str(other))
    assert done.returncode == 2 and f"there is no run directory {other} in {runs}; see status.py" in done.stderr


def test_what_a_stage_is_left_alone_for_is_named(runs, fake_slurm, capsys):
    parent, child = next((node.stage_parents[0], node.id) for node in DEMO if node.kind == "test")
    assert cancel.main([parent]) == 0
    printed = capsys.readouterr().out
    assert printed == f"left alone: {parent}; cancel what waits for it too: {child}\n"
    assert cancel.main([parent, child]) == 0
    assert fake_slurm.called("scancel") == [("scancel", *sorted((job_of(runs, parent), job_of(runs, child))))]


def test_nothing_is_said_of_a_stage_that_is_complete(runs, fake_slurm, capsys):
    teacher = stage_of("image_teacher")
    (runs / teacher / "result.json").write_text('{"epochs": 1}')
    del fake_slurm.queue[job_of(runs, teacher)]
    assert cancel.main([teacher]) == 0
    assert capsys.readouterr().out == "nothing to cancel: no stage of these targets is queued or running\n"
    fake_slurm.queue.clear()
    assert cancel.main(["demo"]) == 0
    assert capsys.readouterr().out == "nothing to cancel: no stage of these targets is queued or running\n"
