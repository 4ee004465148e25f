"""The checks before a start: who is blamed, what a run that passes logs, and when another host would help."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from mvd.config import ConfigError
from mvd.config.run_settings import Faults
from mvd.distributed import preflight
from mvd.distributed.faults import HostFault
from mvd.distributed.preflight import Report
from mvd.distributed.process import Process, start_processes
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from tests.runs import small_stage, succeed, write_stage

NAMES = ("one", "nobody", "one of a host", "one of this machine", "no list", "other list", "all")


def run_all(folder: Path) -> None:
    """The second process pretends to be another host, which cannot write; then neither can the first one.

    In "no list" and "other list" the second host has no list of samples, or another one.
    """
    process = start_processes()
    write_test = preflight._write_test

    def cannot_write(stage: Stage, rank: int) -> None:
        if stage.id == "nobody" or (stage.id.startswith("one") and rank == 1):
            raise OSError(30, "Read-only file system")
        write_test(stage, rank)

    preflight._write_test = cannot_write
    for name in NAMES:
        host = "node0" if name.startswith("one of") else f"node{process.rank}"
        os.environ.pop("SLURM_JOB_ID", None)
        os.environ |= {"SLURM_JOB_ID": "1"} if name == "one of a host" else {}
        preflight.hostname = lambda host=host: host
        stage = Stage.from_yaml(folder / name / "stage.yaml")
        if name.endswith("list") and process.rank == 1:
            data = dataclasses.replace(stage.execution.data, train=str(folder / f"{name}.csv"))
            stage = dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, data=data))
        try:
            run_stage(stage)
        except (HostFault, ConfigError, SystemExit) as error:
            said = {"kind": type(error).__name__, "message": str(error)}
            write_json(stage.directory / f"ended-{process.rank}.json", said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "other list.csv").write_text("".join(reversed((motion_root / "train.csv").open().readlines())))
    for name in NAMES:
        write_stage(small_stage("video_teacher", name, folder, motion_root, epochs=1))
    return folder, succeed(run_all, folder)


def ended(runs, name: str) -> list[dict[str, str]]:
    return [json.loads((runs[0] / name / f"ended-{rank}.json").read_text()) for rank in range(2)]


def test_a_host_that_cannot_write_is_blamed_so_that_the_next_attempt_avoids_it(runs):
    said = ended(runs, "one")
    assert [one["kind"] for one in said] == ["HostFault"] * 2
    assert "node1: [Errno 30] Read-only file system" in said[0]["message"] and "node0" not in said[0]["message"]
    fault = json.loads((runs[0] / "one" / "faults.jsonl").read_text())
    assert (fault["fault"], fault["hosts"]) == ("preflight", ["node1"])


def test_a_process_that_fails_on_the_only_host_blames_that_host(runs):
    assert [one["kind"] for one in ended(runs, "one of a host")] == ["HostFault"] * 2
    fault = json.loads((runs[0] / "one of a host" / "faults.jsonl").read_text())
    assert (fault["fault"], fault["hosts"]) == ("preflight", ["node0"])


def test_without_slurm_there_is_no_other_host(runs):
    assert ended(runs, "one of this machine")[0]["kind"] == "ConfigError"
    assert not (runs[0] / "one of this machine" / "faults.jsonl").exists()


def test_what_no_host_can_do_is_no_hosts_fault(runs):
    said = ended(runs, "nobody")
    assert [one["kind"] for one in said] == ["ConfigError", "SystemExit"]
    assert "no host passes the checks before the start: node0: [Errno 30]" in said[0]["message"]
    assert not (runs[0] / "nobody" / "faults.jsonl").exists()


def test_a_list_that_one_host_lacks_ends_all_processes_with_one_sentence(runs):
    said = ended(runs, "no list")
    assert [one["kind"] for one in said] == ["SystemExit", "ConfigError"]
    assert "no list.csv does not exist" in said[1]["message"]


def test_a_host_with_another_list_is_blamed(runs):
    said = ended(runs, "other list")
    assert [one["kind"] for one in said] == ["HostFault"] * 2
    assert "node1: it has the list " in said[0]["message"] and "node0" not in said[0]["message"]


def test_a_run_that_passes_logs_its_figures(runs):
    (line,) = [line for line in runs[1][0].splitlines() if "preflight: " in line][-1:]
    assert "2 processes on 2 hosts" in line and "GB of memory free" in line and "all-reduce " in line
    assert (runs[0] / "all" / "result.json").exists() and not list(runs[0].glob("all/.preflight*"))
    assert not (runs[0] / "all" / "faults.jsonl").exists()


@pytest.mark.parametrize(("device", "avoid"), [("cpu", False), ("cpu", True), ("cuda", False)])
def test_a_process_that_computes_or_copies_slowly_is_named_before_the_start(tmp_path, device, avoid):
    stage = small_stage("finetune", "run", tmp_path, tmp_path, faults=Faults(avoid_slow=avoid))
    write_stage(stage)
    rates = [{"TFLOP/s": 600.0, "GB/s": 50.0} for _ in range(4)]
    rates[2]["GB/s"] = 12.0 if device == "cpu" else 35.0
    reports = [dataclasses.replace(report(f"node{rank}"), rates=rates[rank]) for rank in range(4)]
    preflight._name_slow(stage, Process(0, 4, torch.device(device)), reports)
    text = f"rank 2 is slow: {rates[2]['GB/s']:g} GB/s, where 50 are usual"
    assert [one.problems for one in reports] == [[], [], [text] if avoid else [], []]
    said = [(fault["fault"], fault["hosts"], fault["message"]) for fault in stage.files.read_faults()]
    assert said == ([] if avoid else [("slow", [], f"node2: {text}")])


def test_of_two_processes_the_slower_one_is_named(tmp_path):
    stage = small_stage("finetune", "run", tmp_path, tmp_path)
    write_stage(stage)
    reports = [dataclasses.replace(report(f"node{rank}"), rates={"TFLOP/s": (600.0, 60.0)[rank]}) for rank in range(2)]
    preflight._name_slow(stage, Process(0, 2, torch.device("cpu")), reports)
    (fault,) = stage.files.read_faults()
    assert fault["message"] == "node1: rank 1 is slow: 60 TFLOP/s, where 600 are usual"


def test_a_wrong_sum_of_the_all_reduce_is_an_error(monkeypatch):
    process = Process(0, 2, torch.device("cpu"))
    monkeypatch.setattr(preflight.dist, "all_reduce", lambda values: values.mul_(2))
    assert preflight.all_reduce_bandwidth(process) > 0
    monkeypatch.setattr(preflight.dist, "all_reduce", lambda values: values[1:].mul_(2))
    with pytest.raises(RuntimeError, match="the all-reduce gave a wrong sum"):
        preflight.all_reduce_bandwidth(process)


def test_rates_are_measured():
    assert 1e-4 < preflight._rates(torch.device("cpu"))["TFLOP/s of a matrix product"] < 100


def report(host: str, clock: float = 1000.0, facts: tuple[str, ...] = ("torch 2",)) -> Report:
    return Report(host, 1.0, 1.0, clock, facts, [])


def test_another_version_and_another_time_are_reported():
    reports = [report("a"), report("b", facts=("torch 1",)), report("c", clock=1060.0), report("d", clock=940.0)]
    preflight._compare(reports)
    assert [one.problems for one in reports] == [
        [],
        ["it has torch 1, unlike the others"],
        ["its clock is +60 s from the others'"],
        ["its clock is -60 s from the others'"],
    ]
