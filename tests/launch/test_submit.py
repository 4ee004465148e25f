"""The command line, as a user meets it."""

import hashlib
import shutil
import subprocess
import sys

import pytest
import torch

from launch.cluster import ROOT
from mvd.config import SIZES
from mvd.weight_check import network_shapes


def test_dry_run_of_all_rows(launch):
    done = launch("submit.py", "experiments/all", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 pre-trainings, 14 fine-tunings, 14 tests" in done.stdout
    assert "16 x 2 x 32 = 1024" in done.stdout and "GPU-hours" in done.stdout
    assert "to set in the cluster profile before submitting" in done.stdout and "datasets.k400.root" in done.stdout
    assert done.stdout.count("pretrain-vith_from_vith_e800-") == 1
    assert "7 sbatch calls" in done.stdout and "aftercorr:#2" in done.stdout
    assert "next:" in done.stdout


def test_the_commands_to_run_next_work_when_they_are_pasted_into_a_fresh_shell(launch, profile, tmp_path):
    done = launch("submit.py", "experiments/demo", "--local", "--dry-run", "--cluster", str(profile))
    commands = [line.strip() for line in done.stdout.partition("next:")[2].splitlines() if line.startswith("    ")]
    assert len(commands) == 2
    for line in [f"{commands[0]} --dry-run", commands[1]]:
        shell = ["env", "-i", "PATH=/usr/bin:/bin", "sh", "-c", line]
        pasted = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert pasted.returncode == 0, pasted.stderr


def test_a_profile_that_exists_is_never_overwritten_by_a_suggested_command(launch):
    done = launch("submit.py", "vith_k400", "--dry-run")  # the fixture's profile has no data set
    assert "to set in the cluster profile" in done.stdout and "cp " not in done.stdout


def test_dry_run_with_teachers_to_train(launch):
    done = launch("submit.py", "vits_from_vitl_ssv2", "teachers=train", "--dry-run")
    assert "1 image teacher, 1 video teacher, 1 pre-training, 1 fine-tuning, 1 test" in done.stdout
    assert "datasets.imagenet.root" in done.stdout and "teachers.mae" not in done.stdout


def test_the_example_profile_as_it_is_does_not_hide_the_plan(launch, profile):
    shutil.copy(ROOT / "cluster.example.yaml", profile)
    done = launch("submit.py", "vith_k400", "--dry-run")
    assert done.returncode == 0 and done.stderr == "" and "1 pre-training, 1 fine-tuning, 1 test" in done.stdout
    needed = done.stdout.partition("to set in the cluster profile before submitting")[2]
    assert (
        "datasets.k400.root: /data/kinetics-400 does not exist" in needed and "teachers.mae_vith: there is no" in needed
    )
    assert launch("submit.py", "vith_k400", "--show").returncode == 0


def test_dry_run_stops_at_a_kind(launch):
    done = launch("submit.py", "k400", "--dry-run", "--until", "pretrain")
    assert "\n7 pre-trainings\n" in done.stdout


def test_the_next_command_is_of_the_same_plan(launch, monkeypatch):
    words = ["demo", "--until", "pretrain", "--together", "demo,demo_nano"]
    done = launch("submit.py", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"    {sys.executable} {ROOT}/launch/submit.py {' '.join(words)}\n" in done.stdout
    monkeypatch.setenv("PATH", "/nowhere")  # no sbatch
    refused = launch("submit.py", *words)
    assert f"submit.py {' '.join(words)} --local" in refused.stderr


def test_dry_run_for_this_machine(launch):
    done = launch("submit.py", "experiments/demo", "finetune.seed=1", "--local", "--dry-run")
    assert done.returncode == 0 and "8 x 1 x 2 = 16" in done.stdout and "to set in" not in done.stdout
    assert "sbatch" not in done.stdout


def test_show_prints_every_setting(launch):
    done = launch("submit.py", "vith_k400", "--show", "finetune.optimization.epochs=7")
    assert done.returncode == 0
    for line in ("name: vith_k400", "epochs: 7", "layer_decay: 0.75", "top1: 87.3", "depth: 32", "teachers.mae_vith"):
        assert line in done.stdout
    assert f"{ROOT}/launch/submit.py vith_k400 finetune.optimization.epochs=7 --dry-run" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiments/vit_k400", "--dry-run"], "no row or suite"),
        (["vith_k400", "finetune.sed=1", "--dry-run"], "nearest: seed"),
        (["vith_k400", "finetune.seed=x", "--dry-run"], "must be an integer, got 'x'"),
        (["vith_k400", "cluster.gpus_per_nod=1", "--dry-run"], "nearest: gpus_per_node"),
        (["vith_k400", "cluster.gpus=1", "--dry-run"], "did you mean gpus_per_node?"),
        (["vith_k400", "gpus_per_node=4", "--dry-run"], "write cluster.gpus_per_node=4"),
        (["demo", "finetune.optimization.global_batch=4096", "--dry-run"], "motion has 2400 training samples, fewer"),
        (["vith_k400", "cluster.pretrain.nodes=7", "--dry-run"], "use 32 or 64 GPUs"),
        (["vith_k400", "cluster.datasets.k400.root=/nowhere"], "datasets.k400.root: /nowhere does not exist; correct"),
        (["vith_k400", "--script", "--local", "--dry-run"], "--script prints what --dry-run would submit to SLURM"),
        (
            ["vith_k400", "pretrain.weights=/nowhere.pth", "--dry-run"],
            "there is no file /nowhere.pth; correct the path",
        ),
        (["vith_k400", f"finetune.weights={__file__}", "--until", "finetune"], "replace all stages up to finetune"),
        (["vith_k400", "--local"], "must set datasets.k400.root: folder of the k400 videos (see "),
        (["vith_k400"], "must set datasets.k400.root"),
        (["demo"], "there is no sbatch on this machine; log in to the cluster, or run the rows here: "),
        (["demo", "--force", "test"], "--force must match one stage, but 'test' matches 3; use one of test-demo-"),
        (["demo", "--force", "finetune", "--dry-run"], "--force changes the runs folder"),
        (["demo", "cluster.slurm.options.nodes=2", "--dry-run"], "slurm.options.nodes is set by the launcher"),
        (["demo", "cluster.slurm.time_limit_hours=0.05", "--dry-run"], "must be longer than slurm.warning_seconds=300"),
        (["demo", "cluster.slurm.setup=module", "--dry-run"], "slurm.setup must be a list of strings, got 'module'"),
        (["demo", "--cluster", "/nowhere.yaml"], "no cluster profile /nowhere.yaml"),
        (["demo", "--until", "pretraining"], "invalid choice: 'pretraining'"),
        (["demo", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["finetune.seed=1"], "no TARGET given"),
        ([], "TARGET"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no sbatch
    done = launch("submit.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_given_weights_are_named_in_the_plan(launch, tmp_path):
    shapes = network_shapes("pretrain", SIZES["huge"], 5)
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "student.pth")
    done = launch("submit.py", "vith_k400", "pretrain.weights=student.pth", "--dry-run")
    digest = hashlib.sha256((tmp_path / "student.pth").read_bytes()).hexdigest()
    assert f"pretrain weights given: {tmp_path}/student.pth (sha256 {digest[:8]}...)" in done.stdout
    assert "pretrain.weights: its head for 5 classes is replaced by a new one for 400" in done.stdout
    assert "1 fine-tuning, 1 test" in done.stdout and "teachers." not in done.stdout


def test_weights_of_another_size_are_refused_before_anything_is_queued(launch, tmp_path):
    shapes = network_shapes("finetune", SIZES["small"], 8)
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "small.pth")
    done = launch("submit.py", "vith_k400", "finetune.weights=small.pth")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "small.pth holds an encoder of width 384 and depth 12, but size 'huge' has width 1280" in done.stderr


def test_planning_does_not_import_torch(profile):
    code = (
        "import sys; from launch import submit; submit.main(['experiments/all', '--dry-run']); "
        "submit.main(['demo', '--local', '--show']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_a_reader_that_leaves_early_is_no_error(profile):
    command = f"{sys.executable} {ROOT}/launch/submit.py all --dry-run | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("plan of 14 rows") and done.stderr == ""


def test_help_has_examples(launch):
    done = launch("submit.py", "--help")
    assert done.returncode == 0 and "python launch/submit.py experiments/demo --local" in done.stdout


def test_the_scripts_of_a_plan_are_printed_without_anything_being_made(launch, tmp_path):
    done = launch("submit.py", "vitb_from_vitb_k400", "--dry-run", "--script", "cluster.slurm.partition=gpu")
    missing = ("datasets.k400.root", "teachers.mae_vitb", "teachers.videomae_vitb")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == len(missing)
    for line, field in zip(done.stderr.splitlines(), missing, strict=True):
        assert line.startswith(f"to set in the cluster profile before submitting: {field}: ")
    assert done.stdout.count("#!/bin/bash") == 3 and done.stdout.count("#SBATCH --partition=gpu") == 3
    assert "#SBATCH --dependency='afterok:#1'" in done.stdout and not (tmp_path / "runs").exists()
    alone = launch("submit.py", "vitb_from_vitb_k400", "--script")
    assert alone.returncode == 2 and "add --dry-run" in alone.stderr


@pytest.mark.parametrize("rehearse", [[], ["--rehearse"]])
def test_nothing_is_put_aside_where_nothing_can_be_submitted(launch, profile, tmp_path, monkeypatch, rehearse):
    monkeypatch.setenv("PATH", "/nowhere")
    name = "image_teacher-mae_tiny-24e05301"
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    done = launch("submit.py", "demo", "--force", name, *rehearse)
    assert done.returncode == 2 and "there is no sbatch" in done.stderr and folder.is_dir()
    unknown = launch("submit.py", "demo", "--force", "teacher")
    assert "--force must match one stage" in unknown.stderr
