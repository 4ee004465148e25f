"""The process that each full-size case runs in, tried on the tiny size."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.runs import small_stage, write_stage


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_driver_makes_one_update_and_ends(kind, tmp_path, motion_root, teachers):
    inputs = teachers if kind == "pretrain" else {}
    # The first update of a warmup has a learning rate of 0 and would change nothing.
    stage = small_stage(kind, kind, tmp_path, motion_root, inputs, world_size=1, micro_batch=4, warmup_epochs=0)
    command = [sys.executable, "-m", "tests.fullsize.update", str(write_stage(stage))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MASTER_PORT": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == [] and result["frozen_but_changed"] == [] and result["changed"]
    assert result["values"]["loss"] > 0 and all(math.isfinite(value) for value in result["values"].values())
    assert (result["teacher_parameters"] > 0) == (kind == "pretrain") and result["teacher_gradients"] == 0
    assert not list(stage.directory.glob("checkpoints/*"))
    assert (stage.directory / "weights.safetensors").is_file()
