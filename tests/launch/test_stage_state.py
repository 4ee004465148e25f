"""What status.py says of stages, from run directories and SLURM's answers, which are stood in for."""

import json
import os

import pytest

from launch import status
from launch.cli.parser import Parser
from launch.cluster import Cluster
from launch.job.record import Attempt, Record, read_record, write_record
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from launch.stage_state import duration, from_plan, from_runs, stage_states
from launch.status import show
from mvd.config.typed import parse_override
from mvd.distributed.faults import record_fault
from mvd.host import hostname
from mvd.run_directory import RunDirectory

ROW = "vitb_from_vitb_k400"
NODES = build_graph(load_rows([ROW], []))
PRETRAIN, FINETUNE, TEST = (node.id for node in NODES)


@pytest.fixture
def runs(tmp_path, fake_slurm):
    """Run directories of a row, submitted as jobs 1, 2 and 3."""
    parents = {PRETRAIN: [], FINETUNE: [PRETRAIN], TEST: [FINETUNE]}
    for number, (stage, waits) in enumerate(parents.items(), start=1):
        write_record(RunDirectory(tmp_path / stage), Record(str(number), str(tmp_path), "2026-01-01", 4, [ROW], waits))
    return tmp_path


def texts(runs):
    return {stage: state.text for stage, state in stage_states(from_plan(NODES), runs).items()}


def change(runs, stage, **fields):
    record = read_record(RunDirectory(runs / stage))
    for name, value in fields.items():
        setattr(record, name, value)
    write_record(RunDirectory(runs / stage), record)


def attempts(job, *saved, **last):
    made = [Attempt(job, "node1", "2026-01-01", update) for update in saved]
    return [*made[:-1], Attempt(job, "node1", "2026-01-01", saved[-1], **last)]


def test_queued_running_and_waiting(runs, fake_slurm):
    fake_slurm.runs("1")
    fake_slurm.runs("2", "PENDING", "Dependency")
    fake_slurm.runs("3", "PENDING", "Priority")
    assert texts(runs)[PRETRAIN] == "running for 3:20:00: starting, 0 of 400 epochs"
    change(runs, PRETRAIN, attempts=attempts("1", 0, 5000, 9000))
    line = {"update": 23_400, "epoch": 101, "epochs_done": 100.0, "samples_per_second": 1024.0}
    line |= {"speed/tflops_per_gpu": 312.0, "speed/mfu": 0.316}
    (runs / PRETRAIN / "metrics.jsonl").write_text(json.dumps(line) + '\n{"update": 23401, "val_top1": 3}\n{"upda')
    assert texts(runs) == {
        PRETRAIN: "running for 3:20:00: epoch 101 of 400, 1024.0 clips/s, 312 TFLOP/s a GPU (MFU 32 %), "
        "19 h 30 min left; requeued 2 times",
        FINETUNE: f"waiting for {PRETRAIN}",
        TEST: "queued (Priority)",
    }


def test_a_failure_is_the_reason_of_its_children(runs, fake_slurm):
    change(
        runs,
        PRETRAIN,
        error="3 attempts have saved nothing new; the last one:\nValueError: x",
        attempts=attempts("1", 0),
    )
    fake_slurm.history |= dict.fromkeys("123", ("CANCELLED by 0", ""))
    assert texts(runs) == {
        PRETRAIN: "failed: ValueError: x",
        FINETUNE: f"cancelled: its parent {PRETRAIN} failed",
        TEST: f"cancelled: its parent {FINETUNE} cancelled",
    }


def test_a_child_that_has_run_itself_is_not_said_to_have_waited_for_a_failed_parent(runs, fake_slurm):
    change(runs, PRETRAIN, error="ValueError: x", attempts=attempts("1", 0))
    change(runs, FINETUNE, attempts=attempts("2", 0))
    assert texts(runs)[FINETUNE] == "failed: its job has left the queue"


def test_a_student_that_has_failed_does_not_run_although_its_job_goes_on(runs, fake_slurm):
    fake_slurm.runs("1")
    change(runs, PRETRAIN, error="ValueError: x", attempts=attempts("1", 0), together=["pretrain-other"])
    assert texts(runs)[PRETRAIN] == "failed: ValueError: x"


def test_fewer_gpus_are_told_as_long_as_an_attempt_runs_on_them(runs, fake_slurm):
    fake_slurm.runs("1")
    change(runs, PRETRAIN, attempts=attempts("1", 0, shrunk_to=4))
    assert texts(runs)[PRETRAIN].endswith("; on 4 GPUs until the next requeue")
    change(runs, PRETRAIN, attempts=attempts("1", 0, shrunk_to=4, ended="2026-01-02"))
    assert "GPUs" not in texts(runs)[PRETRAIN]


def test_a_job_that_left_without_a_word(runs, fake_slurm):
    change(runs, PRETRAIN, attempts=attempts("1", 0))
    assert texts(runs)[PRETRAIN] == "failed: its job has left the queue"
    fake_slurm.history["1"] = ("TIMEOUT", "")
    assert texts(runs)[PRETRAIN] == "failed: SLURM says TIMEOUT"
    (runs / "1_0_log.out").write_text("=== job 1\nslurmstepd: error: Detected 1 oom-kill event\nbye\n")
    assert texts(runs)[PRETRAIN] == "failed: slurmstepd: error: Detected 1 oom-kill event"
    fake_slurm.history["1"] = ("CANCELLED by 0", "")
    assert texts(runs)[PRETRAIN] == "cancelled"


def test_what_is_done_and_what_was_never_submitted(runs):
    result = {"complete": True, "loss": 0.5, "epochs": 400}
    (runs / PRETRAIN / "result.json").write_text(json.dumps(result))
    (runs / TEST / "job.json").unlink()
    found = texts(runs)
    assert (found[PRETRAIN], found[TEST]) == ("done: training loss 0.5000", "not submitted")


def test_a_local_run(runs, fake_slurm):
    fake_slurm.missing.add("sbatch")
    mine = f"local-{os.getpid()}"
    change(runs, PRETRAIN, job_id=mine, attempts=[Attempt(mine, hostname(), "2026-01-01", 0)])
    assert texts(runs)[PRETRAIN] == f"running on {hostname()}: starting, 0 of 400 epochs"
    change(runs, PRETRAIN, attempts=[Attempt(mine, hostname(), "2026-01-01", 0, "2026-01-02", "exit code 1")])
    assert texts(runs)[PRETRAIN] == "stopped: exit code 1"
    log = read_record(RunDirectory(runs / PRETRAIN)).log()
    log.parent.mkdir(parents=True, exist_ok=True)
    old = "ValueError: of an earlier attempt\n=== job local-2, rank 0 on vm, 2026-01-01\n"
    log.write_text(f"{old}WARNING no pictures, going on: RuntimeError: x\n".replace("WARNING", "rank 0 WARNING"))
    assert texts(runs)[PRETRAIN] == "stopped: exit code 1"
    log.write_text(f"{old}error: the disk is full\n")
    assert texts(runs)[PRETRAIN] == "stopped: error: the disk is full"
    change(runs, PRETRAIN, attempts=[Attempt(mine, hostname(), "2026-01-01", 0, "2026-01-02", "on request")])
    assert texts(runs)[PRETRAIN] == "stopped: on request"
    gone = "local-999999999"
    change(runs, PRETRAIN, job_id=gone, attempts=[Attempt(gone, hostname(), "2026-01-01", 0)])
    assert texts(runs)[PRETRAIN] == "stopped: its launcher is gone"


def test_shards_are_one_line(runs, fake_slurm):
    (runs / TEST / "job.json").unlink()
    folders = [runs / TEST / "shards" / f"{number:04d}-of-0003" for number in range(3)]
    for number, folder in enumerate(folders):
        write_record(RunDirectory(folder), Record(f"3_{number}", str(runs), "2026-01-01", 1, [ROW], [FINETUNE]))
    (folders[0] / "result.json").write_text("{}")
    fake_slurm.runs("3_1")
    fake_slurm.runs("3_2", "PENDING", "Resources")
    assert texts(runs)[TEST] == "running: 3 shards, 1 done, 1 running, 1 queued"
    del fake_slurm.queue["3_1"]
    change(runs, folders[1].relative_to(runs), error="ValueError: x")
    assert texts(runs)[TEST] == "failed: ValueError: x"


def test_without_rows_the_runs_folder_says_what_there_is(launch, tmp_path):
    runs = tmp_path / "runs"
    for node in reversed(NODES):
        stage = build_stage(node, Cluster(runs=str(runs)))
        stage.directory.mkdir(parents=True)
        (stage.directory / "stage.yaml").write_text(stage.to_yaml())
    write_record(
        RunDirectory(runs / PRETRAIN),
        Record("local-999999999", "", "", 1, [ROW], [], [Attempt("local-999999999", "x", "", 0, "")]),
    )
    assert [(known.id, known.epochs, known.batch) for known in from_runs(runs)] == [
        (PRETRAIN, 400, 1024),
        (FINETUNE, 75, 384),
        (TEST, None, None),
    ]
    printed = launch("status.py")
    assert printed.returncode == 0, printed.stderr
    assert PRETRAIN in printed.stdout and "not submitted" in printed.stdout and "3 stages" in printed.stdout
    only = launch("status.py", FINETUNE).stdout
    assert TEST not in only
    suggested = only.partition("next:")[2]
    assert "report.py" in suggested and "submit.py" not in suggested and FINETUNE not in suggested
    assert "submit.py" not in launch("cancel.py", FINETUNE).stdout  # which takes no run directories


def test_the_suggested_log_is_that_of_a_running_stage(profile, tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    stage = build_stage(NODES[0], Cluster(runs=str(runs)))
    stage.directory.mkdir(parents=True)
    stage.files.stage.write_text(stage.to_yaml())
    me = f"local-{os.getpid()}"
    attempt = Attempt(me, hostname(), "2026-01-01T00:00:00+00:00", 0)
    write_record(stage.files, Record(me, "", "", 1, [ROW], [], [attempt]))
    assert status.main([]) == 0
    said = capsys.readouterr().out
    assert f"logs.py {PRETRAIN} --follow" in said, said


def test_a_damaged_run_directory_is_named_and_the_others_are_shown(launch, tmp_path):
    runs = tmp_path / "runs"
    for node in NODES:
        stage = build_stage(node, Cluster(runs=str(runs)))
        stage.directory.mkdir(parents=True)
        (stage.directory / "stage.yaml").write_text(stage.to_yaml())
    (runs / PRETRAIN / "job.json").touch()
    (runs / FINETUNE / "result.json").write_text("{")
    (runs / "test-cut-off").mkdir()
    (runs / "test-cut-off" / "stage.yaml").write_text("kind: test\nid: [")
    (runs / FINETUNE / "metrics.jsonl").write_bytes(b"{\xff\x00}\n[1]\n")
    printed = launch("status.py")
    assert printed.returncode == 0 and printed.stderr == ""
    assert (
        f"{PRETRAIN}/job.json is damaged" in printed.stdout and f"{FINETUNE}/result.json is damaged" in printed.stdout
    )
    assert "test-cut-off/stage.yaml is damaged; submit its row again" in printed.stdout
    assert "4 stages" in printed.stdout and printed.stdout.count("not submitted") == 1


def test_a_file_that_cannot_be_read_is_one_sentence(launch, tmp_path):
    (tmp_path / "runs" / "pretrain-x" / "job.json").mkdir(parents=True)
    (tmp_path / "runs" / "pretrain-x" / "stage.yaml").touch()
    done = launch("cancel.py", "pretrain-x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/runs/pretrain-x/job.json: Is a directory\n"


def test_stages_of_one_name_show_in_which_settings_they_differ(profile, tmp_path, capsys):
    for seed in (0, 3):
        for node in build_graph(load_rows([ROW], [parse_override(f"finetune.seed={seed}")])):
            stage = build_stage(node, Cluster(runs=str(tmp_path / "runs")))
            stage.directory.mkdir(parents=True, exist_ok=True)
            (stage.directory / "stage.yaml").write_text(stage.to_yaml())
    assert status.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kind, count in (("pretrain", 0), ("finetune", 1), ("test", 1)):
        shown = [line for line in lines if f" {kind}-" in line]
        assert [sum(f"finetune.seed={seed}" in line for line in shown) for seed in (0, 3)] == [count, count]


def test_a_changed_row_says_so_beside_its_state(profile, capsys):
    assert status.main([ROW, "finetune.optimization.epochs=10"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{ROW}: target 82.7 / 95.4 (paper); 1 field differs from the paper: finetune.optimization.epochs 75 -> 10"
        in printed
    )


def test_the_faults_of_stages_under_way_are_shown(runs, capsys):
    for update in (4, 6):
        record_fault(RunDirectory(runs / PRETRAIN), "save", f"step-{update} cannot be written", update)
    record_fault(RunDirectory(runs / FINETUNE), "hang", "rank 3 on node7 is silent")
    (runs / FINETUNE / "result.json").write_text(json.dumps({"complete": True, "val_top1": 81.0}))
    show(Parser("status.py", "", "").read([ROW, f"cluster.runs={runs}"]))
    printed = capsys.readouterr().out
    assert f"{PRETRAIN}: 2 x save; the last, at 20" in printed and "step-6 cannot be written" in printed
    assert "node7" not in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (3600, "1 h"), (7261, "2 h 1 min"), (100_000, "1 d 3 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("job", "option"), [("local-7", " --local"), ("7", "")])
def test_what_ran_here_is_to_run_here_again(profile, runs, capsys, fake_slurm, job, option):
    fake_slurm.missing.add("sbatch")
    attempt = Attempt(job, hostname(), "2026-01-01", 0, "2026-01-02", "exit code 1")
    for stage in (PRETRAIN, FINETUNE, TEST):
        change(runs, stage, job_id=job, attempts=[attempt])
    assert status.main([ROW, f"cluster.runs={runs}"]) == 0
    assert f"submit.py {ROW} cluster.runs={runs}{option}\n" in capsys.readouterr().out
