"""Running a plan on this machine: what is run, skipped, refused and interrupted. Tiny programs replace the stages."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.demo import rows as demo
from experiments.vitb_from_vitb_k400 import row
from launch import logs, status, submit
from launch.cluster import ROOT, Cluster, Resources
from launch.job.record import read_record
from launch.local import run as local
from launch.plan.differences import noted_rows
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config import ConfigError
from mvd.run_directory import RunDirectory
from mvd.stage import Stage
from tests.launch.finished_runs import finish
from tests.waiting import LIMIT

# What a stage leaves: each process says who it is, the first one writes weights and the result.
STAGE = """
import json, os, pathlib, sys
rank = os.environ["RANK"]
seen = [os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")]
for directory in map(pathlib.Path, sys.argv[1:]):
    print(f"rank {rank} of {directory.name}", flush=True)
    (directory / f"rank-{rank}").write_text(" ".join(seen))
    if rank == "0":
        (directory / "weights.safetensors").touch()
        result = {"epochs": 1, "wall_seconds": 3.4, "loss": 0.25, "top1": 75.0, "top5": 99.0, "unreadable": []}
        if not directory.name.startswith("test"):
            del result["top1"]
        (directory / "result.json").write_text(json.dumps(result))
os.write(2, b"error: a warning without a line end")
"""


def stand_in(program):
    return lambda *stages: [sys.executable, "-S", "-c", program, *(str(stage.directory) for stage in stages)]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def words(profile, tmp_path):
    """The demo, its data set being there already."""
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "test.csv").touch()
    return ["demo", f"cluster.datasets.motion.root={tmp_path / 'motion'}", "--local"]


def test_runs_every_stage_once_and_reports(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "stage_command", stand_in(STAGE))
    assert submit.main(words) == 0
    first = capfd.readouterr().out
    nodes = build_graph(load_rows(["demo"], []))
    threads = max(1, local.CORES // 2)
    for node in nodes:
        directory = tmp_path / "runs" / node.id
        stage = Stage.from_yaml(directory / "stage.yaml")
        assert (stage.id, stage.execution.world_size, stage.execution.precision) == (node.id, 2, "fp32")
        assert [(directory / f"rank-{n}").read_text() for n in (0, 1)] == [f"2 {n} {threads}" for n in (0, 1)]
        assert node.id in first and f"rank 1 of {node.id}\n" in first
        record = read_record(stage.files)
        assert (record.rows, record.parents) == (list(node.rows), node.stage_parents)
        log = record.log(1).read_text()
        assert log.startswith(f"=== job {record.job_id}, rank 1 on ") and f"rank 1 of {node.id}\n" in log
        assert "error: a warning" in log and noted_rows(stage.files)["demo" if "demo" in node.rows else node.rows[0]]
    assert first.count("has no logits; details of single videos need them") == 3
    assert "test top-1 75.0 %, top-5 99.0 %" in first and "training loss 0.2500" in first and "3 s" in first
    students = " and ".join(node.id for node in nodes if node.kind == "pretrain")
    assert f"{students} ran together with one pass of their teachers" in first
    assert "saved 29 % of the operations" in first
    assert "-m tensorboard.main --logdir" in first and "report.py demo" in first and "+5.0" in first

    monkeypatch.setattr(local, "stage_command", stand_in("raise SystemExit(1)"))
    assert submit.main(words) == 0
    second = capfd.readouterr().out
    assert second.count("complete already, skipped") == len(nodes) and "ran together" not in second


def test_a_complete_student_is_not_trained_again_with_the_other(words, tmp_path, monkeypatch):
    started = []

    def command(*stages):
        started.append([stage.id for stage in stages])
        return stand_in(STAGE)(*stages)

    monkeypatch.setattr(local, "stage_command", command)
    assert submit.main([*words, "--until", "pretrain"]) == 0
    _, second = started[-1]
    (tmp_path / "runs" / second / "result.json").unlink()
    started.clear()
    assert submit.main([*words, "--until", "pretrain"]) == 0
    assert started == [[second]]


def test_a_local_runs_log_is_shown_by_the_commands_that_show_jobs(words, monkeypatch, capfd):
    monkeypatch.setattr(local, "stage_command", stand_in("print('error: out of luck'); raise SystemExit(3)"))
    assert submit.main(words) == 1
    capfd.readouterr()
    assert logs.main([word for word in words if word != "--local"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert "_0_log.out" in shown[0] and shown[1].startswith("=== job local-") and shown[2:] == ["error: out of luck"]
    with pytest.raises(ConfigError, match="had no rank 7, or ran in a version that kept no logs"):
        logs.main(["demo", "--rank", "7"])
    assert status.main(["demo"]) == 0
    assert "stopped: error: out of luck" in capfd.readouterr().out


def test_a_tests_summary_has_its_interval_and_the_confused_classes(tmp_path):
    stage = finish(demo[0], tmp_path, videos=80)["test"]
    assert local.test_summary(stage, stage.files.read_result()) == (
        "95 % interval of top-1 64.5 - 83.2 %; most confused: down as clockwise 10 x, shrink as left 10 x"
    )


def test_a_failing_stage_ends_the_run(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "stage_command", stand_in("raise SystemExit(3)"))
    assert submit.main([*words, "--until", "pretrain"]) == 1
    printed = capfd.readouterr()
    assert "error: image_teacher-mae_tiny-" in printed.err and "exit code 3" in printed.err
    assert "--until pretrain --local" in printed.out
    assert len(list((tmp_path / "runs").glob("*/stage.yaml"))) == 1


def test_a_test_whose_shards_are_queued_is_refused(words, tmp_path, monkeypatch, fake_slurm):
    monkeypatch.setattr(local, "stage_command", stand_in(STAGE))
    assert submit.main([*words, "--until", "finetune"]) == 0
    on_slurm = [word for word in words if word != "--local"]
    assert submit.main([*on_slurm, "cluster.test_shards=2"]) == 0
    for path in (tmp_path / "runs").glob("test-*/shards/*/"):
        record = read_record(RunDirectory(path))
        fake_slurm.runs(record.job_id, "RUNNING", directory=record.directory)
    before = {path: path.read_text() for path in (tmp_path / "runs").glob("test-*/stage.yaml")}
    with pytest.raises(ConfigError, match=r"test-demo-\w+ is queued or running already, as job \d+_0, \d+_1; cancel"):
        submit.main(words)
    assert before == {path: path.read_text() for path in before}


def test_a_stage_that_leaves_no_result_has_failed(words, monkeypatch, capfd):
    monkeypatch.setattr(local, "stage_command", stand_in("pass"))
    assert submit.main(words) == 1
    assert "exit code 0 and no result" in capfd.readouterr().err


def test_a_stage_without_its_input_is_refused(words, monkeypatch):
    no_weights = STAGE.replace('(directory / "weights.safetensors").touch()', "pass")
    monkeypatch.setattr(local, "stage_command", stand_in(no_weights))
    with pytest.raises(ConfigError, match=r"pretrain-.*: its image_teacher input .* does not exist"):
        submit.main(words)


# A process that says when it can be signalled, and leaves a file when it was asked to stop.
SAVES = """
import os, pathlib, signal, sys
def save(*_):
    (pathlib.Path(sys.argv[1]) / f"saved-{os.environ['RANK']}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""
REFUSES = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"asked\\n"))
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


def start(words, program):
    code = (
        "import signal, sys; from launch import submit; from launch.local import run as local\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # as in a terminal, even if the tests run under nohup
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # or in the background, where shells ignore it
        f"local.stage_command = lambda stage: [sys.executable, '-S', '-c', {program!r}, str(stage.directory)]\n"
        f"sys.exit(submit.main({words!r}))"
    )
    arguments = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=ROOT, env=os.environ, stdout=pipe, stderr=pipe, text=True)


def wait_for(run, line, times=1):
    while times:
        printed = run.stdout.readline()
        assert printed
        times -= printed == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_lets_its_processes_save_and_says_how_to_go_on(number, words, tmp_path):
    with start(words, SAVES) as run:
        wait_for(run, "ready\n", times=2)
        run.send_signal(number)
        out, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 130
    assert "stopped" in out and f"python launch/submit.py {' '.join(words)}" in out
    assert "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "runs").glob("*/saved-*")) == ["saved-0", "saved-1"]


def test_a_run_under_nohup_outlasts_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    local.stop_on_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_interruption_does_not_wait(words):
    with start(words, REFUSES) as run:
        wait_for(run, "ready\n", times=2)
        run.send_signal(signal.SIGINT)
        wait_for(run, "asked\n", times=2)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 130 and "Traceback" not in err


def test_a_stage_that_a_signal_stopped_says_how_to_go_on(words, monkeypatch, capfd):
    monkeypatch.setattr(local, "stage_command", stand_in("raise SystemExit(75)"))
    assert submit.main(words) == 130
    printed = capfd.readouterr()
    assert "resume from the last checkpoint" in printed.out and "error" not in printed.err


def test_this_machine_takes_its_gpus_or_the_asked_processes(monkeypatch):
    cluster = Cluster(finetune=Resources(nodes=8, deepspeed="zero2"), workers=1000, local_processes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = local.this_machine(cluster)
    assert (on_cpu.gpus("pretrain", row.pretrain), on_cpu.gpus("test", row.test), on_cpu.precision) == (2, 3, "fp32")
    assert on_cpu.finetune.deepspeed == "zero2" and on_cpu.workers == max(1, local.CORES // 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    on_gpu = local.this_machine(cluster)
    assert (on_gpu.gpus("pretrain", row.pretrain), on_gpu.precision) == (2, "bf16")
