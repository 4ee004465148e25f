"""What is handed to sbatch, and what its refusals become. tests/slurm submits for real."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from launch import snapshot
from launch.cli.force import move_aside
from launch.cluster import ROOT, Cluster, Slurm
from launch.plan.arrays import build_arrays
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from launch.slurm.script import explain, parameters
from launch.slurm.submit import resolve
from launch.snapshot import take_snapshot
from mvd.config import ConfigError
from mvd.version import SNAPSHOT

CODE, FOLDER = Path("/runs/code/it's"), Path("/runs/jobs/1")


def script(**fields):
    """The batch script of a row's fine-tuning."""
    cluster = Cluster(slurm=Slurm(**fields))
    nodes = build_graph(load_rows(["vith_k400"], []))
    array = build_arrays(nodes, [build_stage(node, cluster) for node in nodes], {}, cluster)[1]
    return _make_sbatch_string(
        "python x", FOLDER, **parameters(array, cluster, CODE, FOLDER, "afterok:24", cluster.slurm.excluded)
    )


ALWAYS = {  # what every job after array 24 asks for, whatever the profile says
    "time": "1440",
    "signal": "USR2@300",
    "dependency": "afterok:24",
    "kill-on-invalid-dep": "yes",
    "requeue": "",
    "open-mode": "append",
}


def options(text):
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_bare_profile_asks_for_nodes_gpus_and_time_only():
    asked = options(script())
    assert asked.pop("job-name").startswith("finetune-vith_k400-") and asked.pop("output").startswith("/runs/jobs/1/")
    assert (
        asked
        == {
            "nodes": "4",
            "ntasks-per-node": "8",
            "gpus-per-node": "8",
        }
        | ALWAYS
    )


def test_every_field_of_the_profile_reaches_sbatch():
    text = script(
        partition="gpu",
        account="vision",
        qos="high",
        constraint="a100",
        exclude="node7",
        cpus_per_gpu=12,
        memory_gb=480.0,
        time_limit_hours=1.5,
        warning_seconds=60,
        setup=["module load cuda", "source my/env.sh"],
        environment={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "two words"},
        options={"reservation": "r1", "exclusive": True, "gpus-per-node": None, "gres": "gpu:a100:8"},
    )
    asked = options(text)
    expected = {"partition": "gpu", "account": "vision", "qos": "high", "constraint": "a100", "exclude": "node7"}
    expected |= {"cpus-per-task": "12", "mem": "480000M", "time": "90", "signal": "USR2@60", "reservation": "r1"}
    assert expected.items() <= asked.items()
    assert asked["exclusive"] == "" and asked["gres"] == "gpu:a100:8" and "gpus-per-node" not in asked
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in text
    order = [
        "module load cuda",
        "source my/env.sh",
        "export GREETING='two words'",
        "cd ",
        "launch.job.attempts begin",
        "srun ",
    ]
    places = [text.index(part) for part in [*order, "code=$?", "launch.job.attempts end /runs/jobs/1 $code", "exit $?"]]
    assert places == sorted(places)


def test_the_script_ends_where_its_code_is_gone(tmp_path):
    text = script().replace(str(FOLDER), str(tmp_path))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == f"error: {CODE}, the code of this job, is gone; submit it again\n"


def test_names_of_arrays_become_job_ids():
    names = {"#1": "100", "#10": "200"}
    assert resolve("afterok:#1_3:24_0:#10", names) == "afterok:100_3:24_0:200"
    assert resolve("aftercorr:#10", names) == "aftercorr:200" and resolve("", names) == ""


@pytest.mark.parametrize(
    ("message", "said", "field"),
    [
        ("Invalid account or account/partition combination specified", "Invalid account", "slurm.account"),
        ("Invalid qos specification", "Invalid qos", "slurm.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time limit", "slurm.time_limit_hours"),
        ("Node count specification invalid", "Node count", "nodes"),
        ("Job violates accounting/QOS policy", "QOS policy", "slurm.qos"),
        ("Unable to contact slurm controller (connect failure)", "Unable to contact", "the slurm section"),
    ],
)
def test_a_refusal_names_the_field(message, said, field):
    error = f"sbatch: error: something first\nsbatch: error: Batch job submission failed: {message}"
    sentence = explain("pretrain", error)
    assert sentence.startswith("sbatch refuses the pretrain jobs (something first; ") and said in sentence
    assert f"; change {field}" in sentence and sentence.endswith(" in the cluster profile")


def test_the_snapshot_is_the_code_as_it_is_now(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in snapshot.PACKAGES:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(snapshot, "CODE", project)
    (project / "mvd" / "new.py").write_text("answer = 42\n")
    first = take_snapshot(tmp_path / "runs")
    assert take_snapshot(tmp_path / "runs") == first
    (project / "mvd" / "new.py").write_text("answer = 43\n")
    second = take_snapshot(tmp_path / "runs")
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name])
    assert set(json.loads((first / SNAPSHOT).read_text())) == {"commit", "diff"}
    program = "import launch.job.stage_job, mvd.new, mvd.version; print(mvd.new.answer, mvd.version.PROJECT)"
    done = subprocess.run([sys.executable, "-c", program], cwd=first, capture_output=True, text=True)
    assert done.stdout == f"42 {first}\n", done.stderr


def test_redoing_a_stage_puts_it_and_what_was_made_from_it_aside(tmp_path):
    cluster = dataclasses.replace(Cluster(), runs=str(tmp_path))
    nodes = build_graph(load_rows(["vith_k400"], []))
    stages = [build_stage(node, cluster) for node in nodes]
    for stage in stages:
        stage.directory.mkdir()
    move_aside("finetune", nodes, stages)
    pretrain, *redone = (stage.directory for stage in stages)
    assert pretrain.exists() and not any(directory.exists() for directory in redone)
    assert [path.name.partition("-20")[0] for path in sorted((tmp_path / "old").iterdir())] == [p.name for p in redone]
    with pytest.raises(
        ConfigError, match="--force must match one stage, but 'finetun' matches 0; use one of pretrain-"
    ):
        move_aside("finetun", nodes, stages)
