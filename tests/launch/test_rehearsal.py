"""submit.py --rehearse: what is rehearsed, what its report says, and how the plan uses it."""

import dataclasses
import json
import re
import signal
import sys

import pytest

from experiments import all as all_rows
from experiments import vitb_from_vitb_k400, vith_k400
from launch import report, submit
from launch.cluster import Cluster, Resources, Slurm
from launch.job.record import read_record, write_record
from launch.local import run as local
from launch.plan.graph import build_graph
from launch.plan.rehearsals import plan_rehearsals
from launch.plan.rehearsed import rehearsal_name
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from launch.rehearsal_report import cores_needed, largest_micro_batch, profile_changes
from mvd.config import ConfigError, Dataset, DatasetPaths
from mvd.config.typed import parse_override
from mvd.memory import memory_of
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

TINY = "tests/slurm/tiny"
FIGURES = {
    "gpus": 32,
    "micro_batch": 16,
    "gpu": "NVIDIA H100 80GB HBM3",
    "gpu_memory_gb": 85.0,
    "memory_gb": 26.0,
    "loader_workers": 8,
    "generated_data": False,
    "samples_per_second": 1000.0,
    "data_wait_share": 0.2,
    "save_seconds": 9.0,
    "save_stall_seconds": 0.5,
    "save_gb": 10.6,
    "resume_seconds": 40.0,
    "all_reduce_gb_per_second": 123.0,
    "speed/tflops_per_gpu": 250.0,
    "speed/mfu": 0.25,
}


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def names(row, cluster, *settings):
    (row,) = load_rows([row.name], [parse_override(text) for text in settings])
    return {n.kind: rehearsal_name(n, build_stage(n, cluster), cluster, False) for n in build_graph([row])}


def write_figures(runs, name, **changed):
    folder = runs / "rehearsals" / name
    folder.mkdir(parents=True)
    content = {"stage": name, "complete": True, "wall_seconds": 1.0, "rehearsal": {**FIGURES, **changed}}
    (folder / "result.json").write_text(json.dumps(content))


def test_stages_that_do_the_same_work_share_a_rehearsal_in_their_own_layout(tmp_path):
    cluster = Cluster(runs=str(tmp_path), gpu_memory_gb=80, datasets={"k400": DatasetPaths(root=str(tmp_path))})
    nodes = build_graph(all_rows.rows)
    planned = plan_rehearsals(nodes, cluster, local=False)
    assert sorted(name for rehearsal in planned for name in rehearsal.stands_for) == sorted(node.id for node in nodes)
    by_stage = {name: rehearsal for rehearsal in planned for name in rehearsal.stands_for}
    for node in nodes:
        real, rehearsal = build_stage(node, cluster), by_stage[node.id]
        stage = rehearsal.whole.stage
        how, other = stage.execution, real.execution
        assert stage.directory.parent == tmp_path / "rehearsals" and stage.id != node.id
        assert (how.world_size, how.micro_batch, how.deepspeed) == (
            other.world_size,
            other.micro_batch,
            other.deepspeed,
        )
        if node.kind == "test":
            assert rehearsal.resumed is None
            continue
        resumed = rehearsal.resumed.stage.execution
        assert (rehearsal.whole.layout, rehearsal.resumed.layout) == ((4, 8), (2, 8))
        assert resumed.micro_batch * resumed.accumulation * 16 == node.recipe.optimization.global_batch
        assert resumed.rehearsal.resume_from == str(stage.directory) and how.rehearsal.keep_checkpoint
    pairs = [rehearsal.stands_for for rehearsal in planned if "e800-b83b0e95" in " ".join(rehearsal.stands_for)]
    assert len(planned) == 23 and [len(pair) for pair in pairs] == [2]


def test_what_is_missing_is_stood_in_for_and_what_is_there_is_used(tmp_path):
    for name in ("train.csv", "val.csv", "mae.pth"):
        (tmp_path / name).touch()
    teachers = {"mae_vith": str(tmp_path / "mae.pth"), "videomae_vith": str(tmp_path / "later.pth")}
    data = {"k400": DatasetPaths(root=str(tmp_path))}
    cluster = Cluster(runs=str(tmp_path), teachers=teachers, datasets=data)
    pretrain, finetune, test = (r.whole.stage for r in plan_rehearsals(build_graph([vith_k400.row]), cluster, False))
    assert pretrain.execution.rehearsal.random_weights == ["video_teacher"]
    assert pretrain.inputs == {"image_teacher": teachers["mae_vith"]} and pretrain.execution.data == data["k400"]
    assert finetune.execution.rehearsal.random_weights == ["pretrain"]
    generated = [stage.execution.rehearsal.generated_data for stage in (pretrain, finetune, test)]
    assert generated == [False, False, True]  # there is no test.csv
    pretrain.directory.mkdir(parents=True)
    (pretrain.directory / "stage.yaml").write_text(pretrain.to_yaml())
    assert Stage.from_yaml(pretrain.directory) == pretrain


def test_a_name_follows_from_all_that_the_speed_depends_on(tmp_path):
    cluster = Cluster(runs=str(tmp_path))
    row = vitb_from_vitb_k400.row
    name = names(row, cluster)["pretrain"]
    for same in ("epochs=3", "schedule_epochs=500", "base_lr=1", "warmup_epochs=0"):
        assert names(row, cluster, f"pretrain.optimization.{same}")["pretrain"] == name
    assert names(row, cluster, "pretrain.seed=5")["pretrain"] == name
    assert names(row, cluster, "pretrain.mask_ratio=0.8")["pretrain"] != name
    changed = [{"workers": 3}, {"gpus_per_node": 4}, {"nodes": 2}, {"gpu_memory_gb": 80}, {"precision": "fp32"}]
    changed += [{"slurm": Slurm(partition="h100")}, {"slurm": Slurm(cpus_per_gpu=9)}]
    others = [names(row, dataclasses.replace(cluster, **fields))["pretrain"] for fields in changed]
    assert len({name, *others}) == len(changed) + 1


def test_the_plan_uses_measured_rates_and_says_so(profile, tmp_path, capsys):
    (node, *_) = build_graph([vith_k400.row])
    cluster = Cluster(runs=str(tmp_path / "runs"))
    assert submit.main(["vith_k400", "--dry-run"]) == 0
    assert "GPU-hours at 100 TFLOP/s sustained per GPU (cluster.sustained_tflops)" in capsys.readouterr().out
    write_figures(tmp_path / "runs", rehearsal_name(node, build_stage(node, cluster), cluster, False))
    assert submit.main(["vith_k400", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # 469 updates of 512 clips in each of 800 epochs, at 1000 clips/s on 32 GPUs
    hours = 469 * 512 * 800 / 1000 * 32 / 3600
    (line,) = [line for line in printed.splitlines() if line.startswith("1  pretrain")]
    assert f"{hours:,.1f}" in line and f"{hours / 32 / 24:,.1f}" in line
    assert (
        "at the rates that rehearsals measured on NVIDIA H100 80GB HBM3 for # 1; the others at 100 TFLOP/s" in printed
    )
    assert submit.main(["vith_k400", "--dry-run", "cluster.workers=3"]) == 0  # another layout
    assert "rehearsals measured" not in capsys.readouterr().out


def test_the_report_names_what_was_found_and_the_lines_to_change(profile, tmp_path, fake_slurm, capsys):
    cluster = Cluster(runs=str(tmp_path / "runs"))
    for rehearsal in plan_rehearsals(build_graph([vith_k400.row]), cluster, local=False):
        for job in filter(None, (rehearsal.whole, rehearsal.resumed)):
            write_figures(tmp_path / "runs", job.stage.id, resume_seconds=30.0 if job.node.parents else 40.0)
    assert submit.main(["vith_k400", "--rehearse"]) == 0
    printed = capsys.readouterr().out
    assert not fake_slurm.called("sbatch")
    speed, saves = [
        next(line.split() for line in printed.splitlines()[start:] if line.startswith("pretrain-vith"))
        for start in (printed[: printed.index(title)].count("\n") for title in ("3 rehearsals of 3", "checkpoints and"))
    ]
    assert speed[1:] == ["fits", "32", "26.0", "8", "16", "1,000.0", "250", "25", "%", "20", "%", "8", "10"]
    assert saves[1:] == ["9.00", "0.50", "10.60", "40.0", "30.0", "123.00"]
    assert "for # 1, 2, 3, without validation" in printed
    lines = ["gpu_memory_gb: 85", "sustained_tflops: 250  # median of 3 rehearsals, 250 to 250"]
    asked = printed[printed.index("profile lines to change:") :].splitlines()[1:4]
    assert [line.strip() for line in asked] == [*lines, "slurm: {cpus_per_gpu: 10}"]
    assert "random weights for the image teacher, random weights for the video teacher" in printed


def test_the_gpu_hours_of_the_report_are_those_of_the_plan(profile, tmp_path, fake_slurm, capsys):
    rows = ["vits_from_vitb_k400", "vitb_from_vitb_k400", "--until", "pretrain"]
    nodes = build_graph(load_rows(rows[:2], []), "pretrain")
    for rehearsal in plan_rehearsals(nodes, Cluster(runs=str(tmp_path / "runs")), local=False):
        for job in filter(None, (rehearsal.whole, rehearsal.resumed)):
            write_figures(tmp_path / "runs", job.stage.id, gpus=32, samples_per_second=3000.0)
    assert submit.main([*rows, "--rehearse"]) == 0
    report = capsys.readouterr().out
    assert f"submit.py {' '.join(rows)} --dry-run" in report
    assert submit.main([*rows, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    found = re.search(r"about ([\d,]+) GPU-hours \(([\d,]+) without shared teachers\)", plan)
    assert found.group() in report
    assert f"with one pass of their teachers: {found[1]} instead of {found[2]} GPU-hours" in plan


def test_the_report_of_the_rehearsals_folder_finds_no_damage(profile, tmp_path, capsys):
    cluster = Cluster(runs=str(tmp_path / "runs"))
    for rehearsal in plan_rehearsals(build_graph([vith_k400.row]), cluster, local=False):
        write_figures(tmp_path / "runs", rehearsal.whole.stage.id)
        rehearsal.whole.stage.files.stage.write_text(rehearsal.whole.stage.to_yaml())
    assert report.main([f"cluster.runs={tmp_path / 'runs' / 'rehearsals'}"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_a_gpu_without_memory_and_too_few_loader_processes_are_lines_to_change():
    cluster = Cluster(gpu_memory_gb=80, workers=4, sustained_tflops=245)
    error = (
        "failed: error: pretrain-x: rank 3 on b: out of GPU memory; set cluster.pretrain.micro_batch=8, less than 16"
    )
    assert profile_changes({"a": FIGURES}, [error, error], cluster, local=False) == [
        "pretrain: {micro_batch: 8}",
        "workers: 10",
        "slurm: {cpus_per_gpu: 10}",
    ]
    full = "failed: error: out of GPU memory; set cluster.gpu_memory_gb=70.5, with which activations are recomputed"
    waits_little = {**FIGURES, "data_wait_share": 0.04}
    assert profile_changes({"a": waits_little}, [full], cluster, local=False) == ["gpu_memory_gb: 70.5"]


@pytest.mark.parametrize(
    ("present", "waiting", "needed"), [(8, 0.04, 8), (8, 0.5, 16), (8, 0.2, 10), (0, 0.5, 1), (0, 0.8, 4)]
)
def test_cores_needed(present, waiting, needed):
    assert cores_needed({"loader_workers": present, "data_wait_share": waiting}) == needed


def test_the_largest_micro_batch_follows_from_the_measured_peak():
    node = build_graph([vith_k400.row])[0]
    stage = build_stage(node, Cluster(nodes=1, pretrain=Cluster().pretrain))  # a share of 64 clips per GPU
    sample = memory_of(stage.recipe, 8, stage.execution.deepspeed, "bf16").sample / 1e9
    peak = 0.92 * 80 - 1.5 - 24.5 * sample  # room for 24 more than the planned 8
    figures = {**FIGURES, "gpu_memory_gb": 80.0, "memory_gb": peak}
    assert stage.execution.micro_batch == 8 and largest_micro_batch(stage, figures) == 32
    assert largest_micro_batch(stage, {**figures, "memory_gb": peak + sample}) == 16
    assert largest_micro_batch(stage, {**figures, "memory_gb": 79.0}) == 8  # it has run
    del figures["gpu_memory_gb"]
    assert largest_micro_batch(stage, figures) is None


def test_layout_with_its_own_number_of_nodes_is_halved_too(tmp_path):
    cluster = Cluster(runs=str(tmp_path), finetune=Resources(nodes=2))
    finetune = plan_rehearsals(build_graph([vith_k400.row]), cluster, local=False)[1]
    assert (finetune.whole.layout, finetune.resumed.layout) == ((2, 8), (1, 8))
    one = dataclasses.replace(cluster, nodes=1, gpus_per_node=1, finetune=Resources())
    assert all(rehearsal.resumed is None for rehearsal in plan_rehearsals(build_graph([vith_k400.row]), one, False))


OUT_OF_MEMORY = "error: out of GPU memory; set cluster.pretrain.micro_batch=4, half of the present 8"


def test_a_rehearsal_that_fails_is_reported_with_the_way_out(profile, tmp_path, monkeypatch, capfd):
    program = f"import sys; print({OUT_OF_MEMORY!r}, file=sys.stderr); raise SystemExit(2)"
    monkeypatch.setattr(local, "stage_command", lambda *_: [sys.executable, "-S", "-c", program])
    (tmp_path / "motion").mkdir()
    (tmp_path / "motion" / "test.csv").touch()
    words = [TINY, f"cluster.datasets.motion.root={tmp_path / 'motion'}", "--until", "pretrain"]
    assert submit.main([*words, "--rehearse", "--local"]) == 1
    printed = capfd.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("pretrain-tiny-") and "stopped:" in line]
    assert "out of GPU memory" in line and "skipped, since there is no checkpoint to resume" in printed
    assert "profile lines to change:\n  pretrain: {micro_batch: 4}\n" in printed and "speed" not in printed
    assert [path.parent.parent.name for path in (tmp_path / "runs").glob("**/stage.yaml")] == ["rehearsals"]


@pytest.mark.parametrize(
    "options", [["--layouts"], ["--show"], ["--script", "--dry-run"], ["--force", "x", "--dry-run"]]
)
def test_options_that_do_not_go_with_it_are_refused(profile, options):
    with pytest.raises(ConfigError, match="omit"):
        submit.main(["vith_k400", "--rehearse", *options])


def test_a_job_that_failed_is_reported_until_it_is_forced(profile, tmp_path, fake_slurm, capsys):
    def records():
        found = {path.name: read_record(RunDirectory(path)) for path in (tmp_path / "runs" / "rehearsals").glob("*-*/")}
        return {name: record for name, record in found.items() if record}

    assert submit.main(["vith_k400", "--rehearse"]) == 0
    assert len(fake_slurm.called("sbatch")) == 5
    assert "see what they found, once they are done" in capsys.readouterr().out
    (whole,) = [name for name in records() if name.startswith("pretrain") and not name.endswith("-resumed")]
    job, resumed = records()[whole], records()[f"{whole}-resumed"]
    assert f"#SBATCH --dependency=afterok:{job.job_id}\n" in resumed.script.read_text()
    assert "#SBATCH --time=60\n" in job.script.read_text() and "dependency" not in job.script.read_text()

    for record in records().values():  # the others are queued
        fake_slurm.runs(record.job_id, "PENDING", directory=record.directory)
    waiting = next(name for name in sorted(records()) if name.startswith("finetune"))
    for record in (job, resumed):
        del fake_slurm.queue[record.job_id]
    job.error = OUT_OF_MEMORY
    write_record(RunDirectory(tmp_path / "runs" / "rehearsals" / whole), job)
    assert submit.main(["vith_k400", "--rehearse"]) == 1
    printed = capsys.readouterr().out
    assert len(fake_slurm.called("sbatch")) == 5 and f"{whole}: failed: {OUT_OF_MEMORY}" in printed
    assert f"cancel.py {waiting} {waiting}-resumed cluster.runs=" in printed
    assert f"{whole}-resumed: cancelled: its parent" in printed and "pretrain: {micro_batch: 4}" in printed
    assert submit.main(["vith_k400", "--rehearse", "--force", whole]) == 0
    assert len(fake_slurm.called("sbatch")) == 7


def test_an_own_data_set_cannot_be_stood_in_for(tmp_path):
    (row,) = load_rows([TINY], [])[:1]
    own = dataclasses.replace(row.finetune, dataset="mine", own_dataset=Dataset(classes=8, train_samples=48))
    node = dataclasses.replace(build_graph([dataclasses.replace(row, finetune=own, test=None)])[-1])
    with pytest.raises(ConfigError, match="datasets.mine.root must be the folder of your own data"):
        plan_rehearsals([node], Cluster(runs=str(tmp_path)), local=False)


@pytest.mark.slow
def test_a_local_rehearsal_measures_and_leaves_the_stages_alone(profile, tmp_path, capfd):
    """A pre-training for which nothing is there: two processes, then one that resumes them."""
    words = [TINY, "pretrain.dataset=k400", "cluster.workers=2", "--until", "pretrain", "--local"]
    assert submit.main([*words, "--rehearse"]) == 0
    printed = capfd.readouterr().out
    stood_in = "random weights for the image teacher, random weights for the video teacher, generated samples for k400"
    assert f"{stood_in}: pretrain-tiny-" in printed and "rehearsal of pretrain 100% step 42/42" in printed
    folder = tmp_path / "runs" / "rehearsals"
    whole, resumed = sorted(path.parent for path in (tmp_path / "runs").glob("**/result.json"))
    assert whole.parent == folder and resumed.name == f"{whole.name}-resumed" and len(list(folder.glob("*/"))) == 2
    figures = json.loads((whole / "result.json").read_text())["rehearsal"]
    measured = ["samples_per_second", "memory_gb", "save_seconds", "save_gb", "resume_seconds"]
    assert all(figures[name] > 0 for name in (*measured, "all_reduce_gb_per_second"))
    assert 0 < figures["data_wait_share"] < 1 and figures["save_stall_seconds"] <= figures["save_seconds"]
    assert (figures["gpus"], figures["gpu"]) == (2, None) and not any(name.startswith("speed/") for name in figures)
    assert json.loads((resumed / "result.json").read_text())["rehearsal"]["gpus"] == 1
    assert "resuming after update 42" in printed and "resharding: saved by 2 processes" in printed
    left = {path.suffix for path in folder.glob("**/*") if path.is_file()}  # nothing large
    assert not left & {".mp4", ".safetensors", ".pt", ".csv"}
    table = printed[printed.index("1 rehearsal of 1: speed") :].splitlines()
    assert table[2].split()[:3] == [whole.name, "fits", "2"] and "on CPUs" in printed

    assert submit.main([*words, "--rehearse"]) == 0
    assert capfd.readouterr().out.count("complete already, skipped") == 2
    assert submit.main([*words, "--dry-run"]) == 0
    assert "rehearsals measured on CPUs with generated samples for # 1, without validation" in capfd.readouterr().out
