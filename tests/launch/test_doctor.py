"""The doctor says in one line each what of the profile does not fit the site. tests/slurm asks a real SLURM."""

import dataclasses
import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import doctor
from launch.checks import node_job
from launch.checks.folders import check_runs_folder, file_system
from launch.checks.inputs import check_inputs, needed_inputs
from launch.checks.node import check_node
from launch.checks.node_job import run_test_job
from launch.checks.site import check_site, check_test_submission, hours
from launch.cluster import Cluster, PretrainResources, Slurm
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from launch.slurm.client import slurm
from mvd.config import ConfigError, DatasetPaths
from mvd.models import build_image_teacher
from mvd.models.checkpoints import to_official

PARTITIONS = (
    "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP TotalNodes=8\n"
    "PartitionName=old Default=NO MaxNodes=2 MaxTime=04:00:00 State=DOWN TotalNodes=4\n"
)


def site_findings(fake_slurm, **fields):
    fake_slurm.says("scontrol show partition", PARTITIONS)
    profile = {
        name: fields.pop(name) for name in ("partition", "options", "time_limit_hours", "spare_nodes") if name in fields
    }
    cluster = Cluster(slurm=dataclasses.replace(Slurm(), **profile), **fields)
    return {finding.subject: finding for finding in check_site(cluster, slurm)}


def test_a_profile_that_fits(fake_slurm):
    found = site_findings(fake_slurm, nodes=8, partition="gpu")
    assert all(finding.ok for finding in found.values())
    assert found["partition"].text == "gpu: up, 8 nodes, at most 1-00:00:00"


@pytest.mark.parametrize("partition", ["old,gpu", "gpu,old"])
def test_one_of_several_partitions_must_fit(fake_slurm, partition):
    found = site_findings(fake_slurm, nodes=8, partition=partition)["partition"]
    assert found.ok and found.text.startswith("gpu: up")


def test_partitions_that_scontrol_does_not_show_are_not_said_to_be_missing(fake_slurm):
    fake_slurm.fails("scontrol show partition", "Access/permission denied")
    found = {finding.subject: finding for finding in check_site(Cluster(), slurm)}["partition"]
    assert not found.ok and "scontrol show partition fails (Access/permission denied)" in found.text


def test_the_test_job_asks_for_gpus_as_the_profile_does(fake_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(node_job, "take_snapshot", lambda _: tmp_path)
    options = {"gpus-per-node": None, "gres": "gpu:a100:8"}
    cluster = Cluster(runs=str(tmp_path), slurm=Slurm(options=options))
    list(run_test_job(cluster, minutes=0))
    script = next(tmp_path.glob("jobs/*/*_submission.sh")).read_text()
    assert "--gres=gpu:a100:8" in script and "--gpus-per-node" not in script


def test_a_test_job_that_is_interrupted_is_cancelled(fake_slurm, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(node_job, "take_snapshot", lambda _: tmp_path)
    monkeypatch.setattr(node_job.time, "sleep", interrupt)
    fake_slurm.runs("101", "PENDING")
    with pytest.raises(KeyboardInterrupt):
        list(run_test_job(Cluster(runs=str(tmp_path)), minutes=10))
    assert fake_slurm.called("scancel") == [("scancel", "101")]


@pytest.mark.parametrize(("end", "subjects"), [("doctor|end\n", ["GPUs"]), ("", ["GPUs", "test job"])])
def test_a_test_job_that_did_not_finish_is_not_fine(fake_slurm, tmp_path, monkeypatch, end, subjects):
    def submit(folder, *_):
        (folder / "101_0_log.out").write_text(f"doctor|ok|GPUs|8 x A100\n{end}")
        return "101"

    monkeypatch.setattr(node_job, "take_snapshot", lambda _: tmp_path)
    monkeypatch.setattr(node_job, "call_sbatch", submit)
    found = list(run_test_job(Cluster(runs=str(tmp_path)), minutes=0))
    assert [finding.subject for finding in found] == subjects and found[-1].ok == bool(end)


def test_what_the_test_job_finds_wrong_is_to_fix(fake_slurm, tmp_path, monkeypatch):
    def submit(folder, *_):
        (folder / "101_0_log.out").write_text("doctor|ok|Python|found\ndoctor|FIX|GPUs|a|b\ndoctor|end\n")
        return "101"

    monkeypatch.setattr(node_job, "take_snapshot", lambda _: tmp_path)
    monkeypatch.setattr(node_job, "call_sbatch", submit)
    found = list(run_test_job(Cluster(runs=str(tmp_path)), minutes=0))
    assert found == [("Python", True, "found"), ("GPUs", False, "a|b")]


def test_a_test_job_that_does_not_end_in_time_is_cancelled(fake_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(node_job, "take_snapshot", lambda _: tmp_path)
    fake_slurm.runs("101", "PENDING", "Resources")
    (finding,) = run_test_job(Cluster(runs=str(tmp_path)), minutes=0)
    assert not finding.ok and "had not ended after 0 minutes (Resources) and is cancelled" in finding.text
    assert fake_slurm.called("scancel") == [("scancel", "101")]


@pytest.mark.parametrize(("present", "ok"), [(4, False), (8, True), (16, False)])
def test_a_node_has_the_gpus_that_the_profile_says(tmp_path, monkeypatch, present, ok):
    monkeypatch.delenv("MVD_EXPECT_GPU", raising=False)
    for name, value in (("is_available", True), ("device_count", present)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    (finding,) = [finding for finding in check_node(tmp_path, 8) if finding.subject.startswith("GPUs")]
    assert finding.ok is ok and finding.text.startswith("8 x A100" if ok else f"{present} GPUs are visible, expected 8")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"partition": "gpus"}, "slurm.partition=gpus does not exist; set slurm.partition to one of gpu, old"),
        ({"partition": "gpu,gpus"}, "slurm.partition=gpus does not exist; set slurm.partition to one of gpu, old"),
        ({"partition": "old"}, "old is DOWN; set slurm.partition to another one"),
        ({"time_limit_hours": 48.0}, "gpu allows 1-00:00:00, less than slurm.time_limit_hours=48; lower it"),
        ({"nodes": 9}, "gpu allows 8 nodes per job, less than nodes=9; lower nodes"),
        ({"pretrain": PretrainResources(nodes=12)}, "less than nodes=12; lower nodes"),
        ({"nodes": 8, "spare_nodes": 1}, "less than nodes=8 with slurm.spare_nodes=1; lower nodes"),
    ],
)
def test_what_does_not_fit_the_partition(fake_slurm, fields, text):
    finding = site_findings(fake_slurm, **fields)["partition"]
    assert not finding.ok and text in finding.text


@pytest.mark.parametrize(("codes", "ok"), [("(null)", True), ("75,99", True), ("75,1", False), ("75,0-127", False)])
def test_a_site_that_requeues_what_has_failed(fake_slurm, codes, ok):
    fake_slurm.config["RequeueExit"] = codes
    finding = site_findings(fake_slurm)["requeue"]
    assert finding.ok is ok and (ok or f"RequeueExit={codes} in slurm.conf" in finding.text)


def test_a_machine_without_clients_gets_one_line(fake_slurm):
    fake_slurm.missing = {"sbatch", "scontrol"}
    (finding,) = check_site(Cluster(), slurm)
    assert not finding.ok and finding.text.startswith("sbatch, scontrol not found; run this on a login node")


def test_a_controller_that_does_not_answer_ends_the_checks(fake_slurm):
    fake_slurm.fails("scontrol show config", times=9)
    found = list(check_site(Cluster(), slurm))
    assert [finding.subject for finding in found if not finding.ok] == ["controller"] == [found[-1].subject]


def test_a_refused_job_is_told_in_the_sites_words(fake_slurm, tmp_path):
    fake_slurm.fails("sbatch --test-only", "allocation failure: Invalid account", times=9)
    with pytest.raises(ConfigError, match="sbatch would refuse it: allocation failure: Invalid account"):
        check_test_submission(tmp_path / "script.sh", slurm)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("UNLIMITED", float("inf")), ("30", 0.5), ("30:00", 0.5), ("04:00:00", 4), ("1-12", 36), ("2-00:30:00", 48.5)],
)
def test_slurms_time_formats(limit, expected):
    assert hours(limit) == expected


def test_a_runs_folder_that_several_nodes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setattr("launch.checks.folders.LITTLE_GB", 0.0)
    assert "can be written, locked and renamed in" in check_runs_folder(tmp_path / "runs", nodes=4)
    assert list((tmp_path / "runs").iterdir()) == []
    with pytest.raises(ConfigError, match="is on tmpfs, which other nodes do not see"):
        check_runs_folder(Path("/dev/shm/mvd-doctor-test"), nodes=2)
    assert "on tmpfs" in check_runs_folder(Path("/dev/shm/mvd-doctor-test"), nodes=1)
    Path("/dev/shm/mvd-doctor-test").rmdir()
    assert file_system(Path("/dev/shm")) == "tmpfs"


def test_a_disk_that_is_nearly_full(monkeypatch, tmp_path):
    monkeypatch.setattr("launch.checks.folders.LITTLE_GB", 1e9)
    with pytest.raises(ConfigError, match=r"GB free; free at least 1000000000 GB, or set another folder"):
        check_runs_folder(tmp_path, nodes=1)


def test_a_disk_without_locks(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("launch.checks.folders.fcntl.flock", refuse)
    with pytest.raises(ConfigError, match="is on a disk without file locks"):
        check_runs_folder(tmp_path, nodes=1)


def test_data_sets_and_teachers_of_the_profile(tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    save_file(to_official(build_image_teacher("tiny")), teacher)
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "train.csv").write_text("clip.mp4 3\n")
    (tmp_path / "val.csv").write_text("gone.mp4 3\n")
    good = DatasetPaths(root=str(tmp_path), val="none.csv", test="none.csv")
    datasets = {"k400": good, "ssv2": DatasetPaths(root=str(tmp_path)), "mine": DatasetPaths(root="/gone")}
    cluster = Cluster(datasets=datasets, teachers={"mae_tiny": str(teacher), "mae_vitb": str(teacher)})
    found = {finding.subject: finding for finding in check_inputs(cluster)}
    assert found["datasets.k400"].ok and found["datasets.k400"].text.endswith("1 in train.csv")
    assert "val.csv: there is no file" in found["datasets.ssv2"].text and not found["datasets.ssv2"].ok
    assert found["datasets.mine"].text.startswith("there is no folder /gone; correct datasets.mine.root, or delete")
    needed = needed_inputs(build_graph(load_rows(["vitb_from_vitb_k400"], [])))
    assert [finding.subject for finding in check_inputs(cluster, needed)] == ["datasets.k400", "teachers.mae_vitb"]
    assert found["teachers.mae_tiny"].ok and "size 'base' has width 768" in found["teachers.mae_vitb"].text


def test_a_folder_of_images_has_one_folder_per_class(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (finding,) = check_inputs(Cluster(datasets={"imagenet": DatasetPaths(root=str(tmp_path))}))
    assert not finding.ok and "has 2 class folders, expected 1000" in finding.text


def test_the_command_says_what_to_fix(launch):
    done = launch("doctor.py", "cluster.datasets.k400.root=/gone")
    assert done.returncode == 2
    assert "FIX  datasets.k400: there is no folder /gone; correct datasets.k400.root" in done.stdout
    assert "runs folder: " in done.stdout and "to fix" in done.stdout


def test_rows_that_do_not_fit_the_gpus_are_one_line_to_fix(profile, fake_slurm, capsys):
    fake_slurm.says("scontrol show partition", PARTITIONS)
    assert doctor.main(["vith_k400", "cluster.pretrain.nodes=3"]) == 2
    printed = capsys.readouterr().out
    assert "FIX  jobs of the rows: " in printed and " to fix\n" in printed and "next:" in printed


def test_a_partition_among_the_options_counts(fake_slurm):
    found = site_findings(fake_slurm, partition="old", options={"partition": "gpu"})["partition"]
    assert found.ok and found.text.startswith("gpu: up")
