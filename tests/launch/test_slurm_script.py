"""What is handed to sbatch, and what its refusals become. tests/slurm submits for real."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.slurm.slurm import _make_sbatch_string

from launch import snapshot
from launch.cli.force import move_aside
from launch.cluster import ROOT, Cluster, Slurm
from launch.job.record import Record, now, read_record, write_record
from launch.plan.arrays import build_arrays
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from launch.slurm.sbatch import call_sbatch, new_folder
from launch.slurm.script import explain, parameters
from launch.slurm.submit import resolve
from launch.snapshot import take_snapshot
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
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
    assert "--kill-on-bad-exit=1 --export=ALL --cpus-per-task=12" in text
    order = [
        "module load cuda",
        "source my/env.sh",
        "set +eu",
        "export GREETING='two words'",
        "cd '/runs",
        "launch.job.attempts begin",
        "srun ",
    ]
    order += ["code=$?", "launch.job.attempts end /runs/jobs/1 $code", "|| exit $code", "done"]
    places = [text.index(part, text.index("# command") * (part == "srun ")) for part in order]
    assert places == sorted(places)


def test_a_spare_node_is_asked_for_and_its_job_outlasts_the_loss_of_a_node():
    plain, spared = script(), script(spare_nodes=1)
    asked = options(spared)
    assert (asked.pop("nodes"), asked.pop("no-kill")) == ("5", "") and asked.items() <= options(plain).items()
    (guard,) = [line for line in spared.splitlines() if "launch.job.guard" in line]
    assert "--overlap" in guard and guard.endswith('launch.job.guard /runs/jobs/1 "$SLURMD_NODENAME" &')
    assert "guard" not in plain
    shrinking = script(shrink=True)
    assert options(shrinking) == options(plain) | {"no-kill": ""} and "launch.job.guard" in shrinking
    with pytest.raises(ConfigError, match="slurm.spare_nodes must be at least 0, got -1"):
        script(spare_nodes=-1)


def test_an_option_of_zero_is_not_dropped():
    asked = options(script(memory_gb=480.0, options={"mem": 0, "exclusive": False, "gpus-per-node": None}))
    assert asked["mem"] == "0" and "exclusive" not in asked and "gpus-per-node" not in asked


def run_script(tmp_path, setup, srun="exit 7", python='echo "$4 $6"; exit 3'):
    """Runs the script with an srun and a Python of this test's own; returns exit code and the lines that they print."""
    for name, line in {"srun": srun, "python": python}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    text = script(setup=[f"PATH={tmp_path}:$PATH", *setup]).replace(sys.executable, "python")
    text = text.replace(shlex.quote(str(CODE)), str(tmp_path)).replace("|| again $?", "|| true")
    output = subprocess.STDOUT
    done = subprocess.run(["bash", "-c", text], stdout=subprocess.PIPE, stderr=output, text=True, cwd=tmp_path)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("line", ["set -e", "set -euo pipefail", "trap 'exit 9' ERR", ":"])
def test_whatever_the_setup_sets_the_end_of_an_attempt_is_handled(line, tmp_path):
    code, printed = run_script(tmp_path, [line], python='echo "$4 $6" >&2; exit 3')
    assert (code, printed) == (3, ["begin ", "end 7"])


def test_the_processes_start_again_where_begin_says_until_end_says_no_more(tmp_path):
    python = """echo "$4 $MVD_START" >&2
    case "$4$MVD_START" in
      begin*) echo "--overlap --nodelist=node$MVD_START" ;;
      end[01]) echo again ;;
      *) exit 9 ;;
    esac"""
    code, printed = run_script(tmp_path, [], 'echo "$1 $2 $3"; exit 7', python)
    starts = [(f"begin {n}", f"--overlap --nodelist=node{n} --unbuffered", f"end {n}") for n in range(3)]
    assert (code, printed) == (9, [line for start in starts for line in start])


@pytest.mark.parametrize(("code", "restarts", "asked"), [(1, 0, True), (127, 99, True), (1, 100, False), (3, 0, False)])
def test_a_node_where_python_does_not_start_gives_the_job_back(code, restarts, asked, tmp_path, monkeypatch):
    """Code 3 is a refusal, and after 100 restarts the fault is no node's."""
    for name, line in {"python": f"exit {code}", "sleep": ":", "scontrol": 'echo "$@"', "srun": "echo trained"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "26")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    text = script(setup=[f"PATH={tmp_path}:$PATH"]).replace(sys.executable, "python")
    text = text.replace(shlex.quote(str(CODE)), str(tmp_path))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "requeue 26\n" if asked else "")


def test_relative_paths_of_the_setup_start_from_where_the_job_was_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "env.sh").write_text("echo sourced\n")
    text = script(setup=["source my/env.sh", "exit"])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd="/")
    assert done.stdout == "sourced\n"


def test_sbatch_gets_a_script_whose_working_directory_is_its_own_folder(tmp_path, fake_slurm):
    folder = new_folder(tmp_path / "jobs", "finetune")
    cluster = Cluster(slurm=Slurm())
    nodes = build_graph(load_rows(["vith_k400"], []))
    array = build_arrays(nodes, [build_stage(node, cluster) for node in nodes], {}, cluster)[1]
    how = parameters(array, cluster, CODE, folder, "", "")
    assert call_sbatch(folder, how, [print], "finetune") == "101"
    assert {path.name for path in folder.iterdir()} == {"101_submission.sh", "101_submitted.pkl"}
    asked = options((folder / "101_submission.sh").read_text())
    assert asked["chdir"] == str(folder) and "array" not in asked
    folder = new_folder(tmp_path / "jobs", "finetune")
    assert call_sbatch(folder, how, [print, print], "finetune") == "102"
    names = {"102_submission.sh", "102_0_submitted.pkl", "102_1_submitted.pkl"}
    assert {path.name for path in folder.iterdir()} == names
    assert options((folder / "102_submission.sh").read_text())["array"] == "0-1%1"


def test_no_attempt_fails_because_submitit_cannot_write_its_own_result(tmp_path, fake_slurm):
    folder = new_folder(tmp_path / "jobs", "finetune")
    how = {"time": 1, "additional_parameters": {}}
    assert call_sbatch(folder, how, [print], "finetune") == "101"
    (folder / "101_0_result.pkl.save_tmp").touch()  # left by an attempt that ended on a full disk
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "101", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "node1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | job
    command = [sys.executable, "-m", "submitit.core._submit", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nobody_else_can_put_a_pickle_into_a_submissions_folder(tmp_path):
    before = os.umask(0)
    try:
        folder = new_folder(tmp_path / "jobs", "pretrain")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o022 == 0
    assert folder.parent.stat().st_mode & 0o1022 == 0o1022  # others may add folders, not replace this one


@pytest.mark.parametrize("name", ["100%", "run-%j", "back\\slash"])
def test_a_path_that_slurm_would_change_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="SLURM replaces % and .* choose a path without them"):
        new_folder(tmp_path / name / "jobs", "pretrain")


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
        ("Invalid job array specification", "array", "test_shards"),
        ("QOSMaxWallDurationPerJobLimit", "QOSMaxWall", "slurm.time_limit_hours"),
        ("QOSMaxGRESPerJob", "QOSMaxGRES", "nodes or gpus_per_node"),
        ("Unable to contact slurm controller (connect failure)", "Unable to contact", "the slurm section"),
    ],
)
def test_a_refusal_names_the_field(message, said, field):
    error = f"sbatch: error: something first\nsbatch: error: Batch job submission failed: {message}"
    sentence = explain("pretrain", error)
    assert sentence.startswith("sbatch refuses the pretrain jobs (something first; ") and said in sentence
    assert f"; change {field}" in sentence and sentence.endswith(" in the cluster profile")


@pytest.mark.parametrize("limit", ["QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "AssocGrpSubmitJobsLimit"])
def test_a_limit_on_the_number_of_jobs_is_explained(limit):
    error = f"sbatch: error: {limit}\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    sentence = explain("pretrain", error + " (job submit limit, user's size and/or time limits)")
    assert f"({limit}; Job violates" in sentence
    assert sentence.endswith("; submit fewer rows at once, or change slurm.qos or slurm.account in the cluster profile")


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


def test_redoing_a_stage_puts_aside_what_other_rows_made_from_it(tmp_path, fake_slurm, capsys):
    cluster = dataclasses.replace(Cluster(), runs=str(tmp_path))
    for number, node in enumerate(build_graph(load_rows(["vitl_k400", "vitl_ssv2"], []))):
        record = Record(str(number), str(tmp_path), now(), 1, list(node.rows), node.stage_parents)
        write_record(RunDirectory(tmp_path / node.id), record)
    nodes = build_graph(load_rows(["vitl_k400"], []))
    stages = [build_stage(node, cluster) for node in nodes]
    other = next(tmp_path.glob("finetune-*_ssv2-*"))
    fake_slurm.runs(read_record(RunDirectory(other)).job_id)
    with pytest.raises(ConfigError, match=rf"{other.name} is queued or running already, as job \d+; cancel that"):
        move_aside("pretrain", nodes, stages)
    fake_slurm.queue.clear()
    move_aside("pretrain", nodes, stages)
    assert not any(tmp_path.glob("*-vit*")) and len(list((tmp_path / "old").iterdir())) == 5
    assert capsys.readouterr().out.count(", of vitl_ssv2\n") == 2
