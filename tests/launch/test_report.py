"""The report, from fabricated run directories."""

import json
import os
from dataclasses import replace
from datetime import datetime

from experiments.demo import rows as demo
from launch import report
from launch.job.record import Record, write_record
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from launch.reporting.goodput import COLUMNS, goodput_lines
from launch.reporting.results import SeedRun, row_result, seeds_text, spent_gpu_hours
from mvd.config.typed import parse_override
from mvd.run_directory import RunDirectory
from tests.launch.finished_runs import finish


def ids_of(target, *settings):
    nodes = build_graph(load_rows([target], [parse_override(text) for text in settings]))
    return {node.kind: node.id for node in nodes}


def test_rows_that_are_done_running_and_not_started(launch, write_result, tmp_path):
    done, running = ids_of("vitb_from_vitl_k400"), ids_of("vitb_from_vitb_k400")
    write_result(done["pretrain"], epochs=400)
    write_result(done["finetune"], epochs=75)
    unreadable = [f"video{n}.mp4" for n in range(7)]
    write_result(done["test"], top1=83.16, top5=95.9, unreadable=unreadable)
    directory = tmp_path / "runs" / running["pretrain"]
    directory.mkdir()
    records = [json.dumps({"update": n, "epoch": n}) for n in (3, 4)]
    (directory / "metrics.jsonl").write_text("\n".join(records) + '\n{"update": 5, "ep')

    shown = launch("report.py", "vitb_from_vitl_k400", "vitb_from_vitb_k400", "vith_k400", "--markdown")
    assert "metrics.jsonl" not in shown.stderr, "its last line is being written"
    text = shown.stdout
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[:5]}
    reached = ["83.4 / 95.8 (paper)", "83.2 / 95.9", "-", "-0.2", "pretrain 400/400, finetune 75/75", "-"]
    assert cells["vitb_from_vitl_k400"] == [*reached, f"runs/{done['test']}"]
    progress = ["-", "-", "-", "pretrain 3/400, finetune 0/75", "-", f"runs/{running['pretrain']}"]
    assert cells["vitb_from_vitb_k400"] == ["82.7 / 95.4 (paper)", *progress]
    assert cells["vith_k400"] == ["87.3 / 97.4 (paper)", "-", "-", "-", "not started", "-", "-"]
    assert "vitb_from_vitl_k400: 7 videos could not be read and count as wrong: video0.mp4" in text

    table = launch("report.py", "vitb_from_vitl_k400", "vith_k400").stdout
    assert "83.2 / 95.9" in table and "not started" in table and "7 videos could not be read" in table
    assert "-m tensorboard.main --logdir runs" in table


def test_overrides_lead_to_other_run_directories(launch, write_result):
    write_result(ids_of("vith_k400", "finetune.seed=1")["test"], top1=50.0, top5=60.0)
    assert "50.0 / 60.0" in launch("report.py", "vith_k400", "finetune.seed=1").stdout
    assert "not started" in launch("report.py", "vith_k400").stdout


def test_a_report_needs_no_data_paths(launch):
    done = launch("report.py", "vith_k400", "cluster.datasets.k400.root=/nowhere")
    assert done.returncode == 0 and "not started" in done.stdout


def test_a_row_without_a_target_or_a_test(launch, write_result):
    write_result(ids_of("teachers/mae_vitb")["image_teacher"], epochs=1600)
    text = launch("report.py", "teachers/mae_vitb", "--markdown").stdout
    assert "| mae_vitb | - | - | - | - | image_teacher 1600/1600 |" in text


def test_one_damaged_result_does_not_hide_the_others(profile, write_result, capsys):
    damaged = write_result(ids_of("vith_k400")["test"]) / "result.json"
    write_result(ids_of("vitl_k400")["test"], top1=85.0, top5=96.0)
    for content in ("{", '{"top1": 3.0}', "[1]"):
        damaged.write_text(content)
        assert report.main(["vith_k400", "vitl_k400"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert f"{damaged} is damaged; delete it" in printed.err and "85.0 / 96.0" in printed.out


def test_without_a_target_all_runs_are_listed_with_what_differs(profile, tmp_path, capsys):
    for seed in (0, 1):
        finetune = replace(demo[0].finetune, seed=seed)
        stages = finish(replace(demo[0], finetune=finetune), tmp_path, videos=8)
    finish(replace(demo[1], test=replace(demo[1].test, clips=2)), tmp_path, videos=8)
    broken = tmp_path / "runs" / "test-other-00000000"
    broken.mkdir()
    (broken / "stage.yaml").write_text("kind: [")
    assert report.main([]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if "test-demo" in line and "runs/" in line]
    assert len(lines) == 3 and not any("pretrain-" in line for line in printed.out.splitlines())
    assert ["finetune.seed=0" in line for line in lines].count(True) == 1
    assert any("finetune.seed=1" in line and stages["test"].id in line and "70.0 / - (floor)" in line for line in lines)
    assert sum(" 12.5 " in line for line in lines) == 2 and sum(" 5.0 " in line for line in lines) == 1  # 2.5 a stage
    assert printed.err.count("\n") == 1 and "test-other-00000000" in printed.err


def test_errors(launch):
    for word, message in (("vith", "no row or suite"), ("--mark", "TARGET"), ("seed=1", "TARGET")):
        done = launch("report.py", word)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert message in done.stderr


def test_gpu_hours_of_a_row_that_is_not_finished(profile, tmp_path, capsys):
    stages = finish(demo[0], tmp_path, videos=8)
    files = stages["finetune"].files
    files.result.unlink()
    times = {"started": "2026-11-28T10:00:00+00:00", "processes": 8}
    entries = [{**times, "ended": "2026-11-28T11:30:00+00:00", "gpu": "NVIDIA H200"}, {**times, "gpu": "NVIDIA H200"}]
    files.provenance.write_text(json.dumps(entries))
    begun = datetime.fromisoformat(times["started"]).timestamp()
    for path in (files.metrics, files.weights):
        path.touch()
        os.utime(path, (begun + 1800,) * 2)  # its second attempt wrote last half an hour after its start
    assert report.main(["demo"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("demo ")]
    assert f" {4 * 2.5 + 8 * 1.5 + 8 * 0.5:.1f} " in line and "submit.py demo\n" in printed


def test_gpu_hours_of_a_split_test_are_those_of_all_its_shards(tmp_path):
    times = {"started": "2026-11-28T10:00:00+00:00", "ended": "2026-11-28T11:30:00+00:00"}
    for number in (0, 1):
        part = RunDirectory(tmp_path / "shards" / f"{number:04d}-of-0002")
        write_record(part, Record(f"3_{number}", str(tmp_path), times["started"], 1, ["row"], []))
        part.provenance.write_text(json.dumps([{**times, "processes": 1, "gpu": "NVIDIA H200"}]))
    assert spent_gpu_hours(RunDirectory(tmp_path), None) == 2 * 1.5


def test_goodput_has_each_share_in_its_column_and_a_stage_of_several_rows_once(tmp_path):
    stage = finish(demo[0], tmp_path, videos=8)["finetune"]
    times = {"started": "10:00", "training": "10:10", "ended": "11:40"}
    entry = {name: f"2026-11-28T{time}:00+00:00" for name, time in times.items()}
    stage.files.provenance.write_text(json.dumps([{"owner": "24.0.0", **entry}]))
    rate = 10 * stage.recipe.optimization.global_batch / 3600  # 10 updates in an hour
    line = {"update": 10, "epoch": 1, "samples_per_second": rate, "data_wait_share": 0.25}
    line |= {"speed/save_seconds": 360.0, "speed/evaluation_seconds": 180.0}
    stage.files.metrics.write_text(json.dumps(line) + "\n")
    (cells,) = goodput_lines([row_result(demo[0], tmp_path / "runs", [])] * 2)
    named = dict(zip(COLUMNS, cells, strict=True))
    shares = {"updates": 45.0, "data": 15.0, "saves": 6.0, "evaluations": 3.0, "starts": 10.0, "lost": 21.0}
    assert {name: float(named[f"{name} %>"]) for name in shares} == shares
    assert named["stage#"] == stage.id and named["hours held>"] == "1.67"


def test_seeds_of_which_one_runs_pretraining_cannot_be_read():
    runs = [SeedRun({"pretrain": 0, "finetune": 0}, "a", {}), SeedRun({"finetune": 1}, "b", {})]
    assert seeds_text(runs) == "pretrain.seed 0, ?; finetune.seed 0, 1"
    assert seeds_text(runs[::-1]) == "finetune.seed 1, 0; pretrain.seed ?, 0"
