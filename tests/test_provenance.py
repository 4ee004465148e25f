"""provenance.json: one entry per attempt, and inputs that must not change between attempts."""

import dataclasses
import hashlib
import json
import os
import platform
import socket
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from mvd import config, provenance, version
from mvd.config import ConfigError
from mvd.files import write_json
from mvd.provenance import earlier_seconds, record_attempt, result_facts
from mvd.stage import Execution, Stage
from tests.runs import small_stage, write_stage


@pytest.fixture
def stage(tmp_path) -> Stage:
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    made = small_stage("finetune", "tuned", tmp_path, tmp_path, {"pretrain": str(tmp_path / "student.safetensors")})
    write_stage(made)
    return made


def entries(stage: Stage) -> list[dict]:
    return json.loads((stage.directory / "provenance.json").read_text())


def test_each_attempt_records_where_its_numbers_come_from(stage, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert [record_attempt(stage, 2), record_attempt(stage, 4)] == [1, 2]
    first, second = entries(stage)
    assert (first["attempt"], first["processes"], second["attempt"], second["processes"]) == (1, 2, 2, 4)
    assert first["slurm"]["SLURM_JOB_ID"] == "4711"
    assert first["inputs"]["pretrain"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert torch.__version__.startswith(first["packages"]["torch"].split("+")[0])
    assert (first["host"], first["python"]) == (socket.gethostname(), platform.python_version())
    assert first["execution"]["accumulation"] == 2 and first["command"]


def test_a_result_has_the_seeds_of_the_stages_that_it_starts_from(tmp_path, motion_root):
    files = {}
    for kind in ("pretrain", "finetune"):
        made = small_stage(kind, f"{kind}-a", tmp_path, motion_root, files)
        write_stage(made)
        record_attempt(made, 1)
        found = result_facts(made)
        write_json(made.files.result, {"provenance": found})
        made.files.weights.write_bytes(b"weights")
        files = {kind: str(made.files.weights)}
    assert found["seeds"] == {"pretrain": 0, "finetune": 0}


def test_a_result_names_the_lists_that_its_stage_reads(tmp_path):
    digests = {}
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text(f"{split}.mp4 0\n")
        digests[split] = hashlib.sha256(f"{split}.mp4 0\n".encode()).hexdigest()
    for kind, splits in (("finetune", ("train", "val")), ("pretrain", ("train",))):
        made = small_stage(kind, f"{kind}-lists", tmp_path, tmp_path)
        write_stage(made)
        record_attempt(made, 1)
        found = {split: entry["sha256"] for split, entry in result_facts(made)["lists"].items()}
        assert found == {split: digests[split] for split in splits}


def test_a_result_of_shards_counts_the_processes_of_all(tmp_path):
    (tmp_path / "tuned.safetensors").write_bytes(b"weights")
    recipe = config.Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=1)
    stage = Stage(
        kind="test",
        id="shards",
        recipe=recipe,
        inputs={"finetune": str(tmp_path / "tuned.safetensors")},
        execution=Execution(world_size=2, runs=str(tmp_path), shards=3),
    )
    for part in stage.in_shards():
        part.job_directory.mkdir(parents=True)
        record_attempt(part, 2)
    facts = result_facts(stage)
    assert facts["processes"] == 6 and facts["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_result_of_modified_code_says_so(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(version, "PROJECT", tmp_path)
    for diff in ("", "+a line"):
        (tmp_path / version.SNAPSHOT).write_text(json.dumps({"commit": "c0ffee", "diff": diff}))
        record_attempt(stage, 1)
        facts = result_facts(stage)
        assert (facts["commit"], facts["modified"]) == ("c0ffee", bool(diff))


def test_the_code_is_recorded_as_commit_and_diff(stage, tmp_path, monkeypatch):
    record_attempt(stage, 1)
    monkeypatch.setattr(version, "PROJECT", tmp_path)
    record_attempt(stage, 1)
    (tmp_path / version.SNAPSHOT).write_text(
        '{"commit": "c0ffee", "diff": "+a line"}'
    )  # as a job's copy of the code has
    record_attempt(stage, 1)
    first, outside, in_a_job = entries(stage)
    assert (first["commit"] is None) == (not (Path(__file__).parents[1] / ".git").exists())
    assert outside["commit"] is None and outside["diff"] is None
    assert outside["note"] == f"{tmp_path} is not a git checkout"
    assert (in_a_job["commit"], in_a_job["diff"]) == ("c0ffee", "+a line")


def test_an_attempt_lasts_until_the_last_file_it_wrote(stage):
    record_attempt(stage, 1)
    path = stage.directory / "provenance.json"
    (attempt,) = entries(stage)
    began = datetime.fromisoformat(attempt["started"]) - timedelta(hours=1)
    write_json(path, [{**attempt, "started": began.isoformat()}])
    (stage.directory / "metrics.jsonl").touch()
    os.utime(stage.directory / "metrics.jsonl", (began.timestamp() + 90,) * 2)
    assert [record_attempt(stage, 1), record_attempt(stage, 1)] == [2, 3]
    assert earlier_seconds(stage) == 90  # the second one wrote nothing


def test_a_changed_input_is_refused(stage):
    record_attempt(stage, 1)
    Path(stage.inputs["pretrain"]).write_bytes(b"others")
    with pytest.raises(ConfigError, match="student.safetensors is not the pretrain this run started from"):
        record_attempt(stage, 1)
    assert len(entries(stage)) == 1


def test_an_input_that_changed_before_the_first_attempt_is_refused(stage):
    given = dataclasses.replace(stage, digests={"pretrain": hashlib.sha256(b"weights").hexdigest()})
    record_attempt(given, 1)
    Path(stage.inputs["pretrain"]).write_bytes(b"others")
    (stage.directory / "provenance.json").unlink()
    with pytest.raises(ConfigError, match="student.safetensors has changed since tuned was submitted"):
        record_attempt(given, 1)


def test_a_missing_input_is_refused(stage):
    Path(stage.inputs["pretrain"]).unlink()
    with pytest.raises(ConfigError, match="tuned: its pretrain file .* does not exist"):
        record_attempt(stage, 1)


def test_a_package_under_another_name_is_recorded_as_unknown(stage, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "a-package-nobody-has"))
    record_attempt(stage, 1)
    assert entries(stage)[0]["packages"]["a-package-nobody-has"] is None
