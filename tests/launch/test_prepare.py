"""What launch/prepare.py asks of sbatch, and what it refuses. tests/slurm submits for real."""

import re
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from launch import prepare
from launch.cluster import Cluster, Slurm
from tests.launch.test_slurm_script import ALWAYS
from tests.launch.test_slurm_script import options as options_of

CODE = Path("/runs/code/1")


def script(words: str = "", **fields) -> str:
    """The batch script of the last job, after array 24, with this in the profile's slurm section."""
    options = prepare.parse(["/raw", "/data/mine", *words.split()])
    cluster = Cluster(gpus_per_node=8, slurm=Slurm(**fields))
    options.workers = options.workers or prepare.cores(cluster.slurm)
    parameters = prepare.job_parameters(options, cluster, CODE, "list", "afterok:24")
    return _make_sbatch_string("python x", Path("/jobs"), **parameters)


def test_a_bare_profile_asks_for_cores_and_time_only():
    asked = options_of(script())
    assert (
        asked.pop("output").startswith("/jobs/")
        and asked
        == {
            "job-name": "list-mine",
            "nodes": "1",
            "ntasks-per-node": "1",
            "cpus-per-task": "8",
        }
        | ALWAYS
    )


def test_a_gpus_share_of_the_profile_without_the_gpu():
    text = script(
        partition="cpu",
        account="vision",
        cpus_per_gpu=12,
        memory_gb=480.0,
        setup=["module load ffmpeg"],
        environment={"TMPDIR": "/scratch"},
        options={"gpus-per-node": None, "gres": "gpu:a100:8", "mem_per_gpu": "60G", "reservation": "r1"},
    )
    asked = options_of(text)
    expected = {"partition": "cpu", "account": "vision", "cpus-per-task": "12", "mem": "60000M", "reservation": "r1"}
    assert expected.items() <= asked.items() and "gpu" not in text and "gres" not in text
    assert "--cpus-per-task=12" in text.rpartition("srun ")[2]
    places = [text.index(part) for part in ("module load ffmpeg", "export TMPDIR=/scratch", f"cd {CODE}", "srun ")]
    assert places == sorted(places) and "launch.job.attempts" not in text


@pytest.mark.parametrize(
    ("words", "fields", "cores"),
    [
        ("--workers 3", {"cpus_per_gpu": 12}, "3"),
        ("", {"cpus_per_gpu": 12, "options": {"cpus-per-task": 5}}, "5"),
        ("--workers 3", {"options": {"cpus-per-task": 5}}, "3"),
    ],
)
def test_cores_are_those_that_were_asked_for(words, fields, cores):
    assert options_of(script(words, **fields))["cpus-per-task"] == cores


def test_a_dry_run_shows_both_calls_and_leaves_nothing(launch, class_folders, tmp_path):
    words = [str(class_folders), "out", "--array", "4", "cluster.slurm.memory_gb=16", "cluster.slurm.partition=cpu"]
    done = launch("prepare.py", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "24 videos are listed, 0 of them missing; 24 files to check" in done.stdout
    check, last = [line.split() for line in done.stdout.splitlines() if line.startswith(("check-out", "list-out"))]
    assert check == ["check-out", "4", "8", "2000M", "cpu", "24", "h", "-"] and last[-3:] == ["all", "of", "check"]
    assert done.stdout.rstrip().endswith("cluster.slurm.partition=cpu") and "--dry-run" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.yaml", "videos"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "out"], "there is no folder .*none; give the folder that holds the videos"),
        (["videos", "out", "--array", "0"], "--array must be at least 1, got 0; give the number of jobs"),
        (["videos", "out", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["videos", "out", "finetune.seed=1"], "finetune.seed=1: only settings of the cluster profile are accepted"),
        (["videos", "out", "cluster.slurm.partion=x"], r"slurm has no key 'partion' \(nearest: partition"),
        (["videos", "out%j"], "OUTPUT: the path must not contain %, which SLURM treats specially in the paths of logs"),
        (["videos", "out", "--train", "gone.csv"], "there is no list .*gone.csv"),
    ],
)
def test_what_cannot_work_is_one_sentence(words, message, launch, class_folders):
    done = launch("prepare.py", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
