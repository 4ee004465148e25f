"""Rehearsals of three updates at real size, with random weights and generated clips: `pytest -m fullsize`."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.real_size import recipes, with_batch
from mvd.memory import parameters_of
from mvd.stage import Execution, Rehearsal, Stage
from tests.runs import write_stage

RECIPES = recipes()
UPDATES = 3
READ_BEFORE = 2  # updates whose clips the loader may have read while the run starts, which are made too

pytestmark = pytest.mark.fullsize


@pytest.mark.parametrize("name", ["pretrain-vits_from_vitb_e400", "finetune-vitb_from_vitb_k400"])
def test_three_updates_a_save_and_a_resume(name, tmp_path):
    kind = name.partition("-")[0]
    recipe = with_batch(RECIPES[name], 2)
    missing = ["image_teacher", "video_teacher"] if kind == "pretrain" else ["pretrain"]
    how = Execution(
        micro_batch=2,
        precision="fp32",
        runs=str(tmp_path),
        workers=1,
        log_every=1,
        probe_every=0,
        rehearsal=Rehearsal(updates=UPDATES, random_weights=missing, generated_data=True),
    )
    stage = Stage(kind=kind, id=name, recipe=recipe, execution=how)
    command = [sys.executable, "-m", "mvd.run", str(write_stage(stage))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MASTER_PORT": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(stage.files.result.read_text())["rehearsal"]
    print(f"{name}: {figures}")
    assert f"resuming after update {UPDATES + READ_BEFORE}" in done.stdout + done.stderr
    updates = [record["update"] for record in stage.files.read_metrics() if "loss" in record]
    assert updates == list(range(1, UPDATES + READ_BEFORE + 3))
    assert figures["save_gb"] * 1e9 > 12 * parameters_of(recipe)  # weights and AdamW's state in fp32
    assert figures["samples_per_second"] > 0 and figures["memory_gb"] < 12
    assert not stage.files.complete_checkpoints() and not (stage.directory / "stand-ins").exists()
