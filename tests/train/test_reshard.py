"""A run resumes with another number of processes or another ZeRO stage as if it had not been interrupted."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train import engine as engine_module
from tests.runs import again, curve, small_stage, succeed, write_stage
from tests.train.test_engine import SHARDED

UPDATES, HALF = 6, 3
ZERO = ("zero0", "zero1", "zero2", "sharded")
# (saved with, resumed with, by how many processes)
CHANGES = [(zero, zero, count) for zero in ZERO for count in (1, 4)]
CHANGES += [("zero0", "sharded", 1), ("sharded", "zero2", 1), ("zero2", "zero0", 1), ("zero1", "sharded", 2)]


def run_those_of_this_size(folder: Path) -> None:
    engine_module.DS_CONFIGS = folder / "ds_configs"
    for path in sorted(folder.glob("*/*/stage.yaml")):
        stage = Stage.from_yaml(path)
        if stage.execution.world_size == int(os.environ["WORLD_SIZE"]):
            run_stage(stage)


def name_of(change: tuple[str, str, int]) -> str:
    return f"{change[0]}-to-{change[1]}-on-{change[2]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root) -> dict[str, Stage]:
    """Name -> finished run: undisturbed under every ZeRO stage, and resumed half way with every change."""
    folder = tmp_path_factory.mktemp("reshard")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})
    how = {"epochs": 1, "checkpoint_every": HALF, "validate_every": 9}
    how |= {"layer_decay": 0.75, "drop_path": 0.3, "head_dropout": 0.3}
    stages = {
        zero: small_stage("finetune", "finetune", folder / zero, motion_root, deepspeed=zero, **how) for zero in ZERO
    }
    for stage in stages.values():
        write_stage(stage)
    succeed(run_those_of_this_size, folder)
    for change in CHANGES:
        before, after, count = change
        split = {"world_size": count, "micro_batch": 2, "accumulation": 4 // count}
        stage = again(stages[before], folder / name_of(change), deepspeed=after, **split)
        shutil.rmtree(stage.directory / "checkpoints" / f"step-{UPDATES:08d}")
        stages[name_of(change)] = stage
    for count in (1, 2, 4):
        succeed(run_those_of_this_size, folder, count=count)
    return stages


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
def test_a_run_goes_on_as_the_undisturbed_one(runs, change):
    reference, stage = runs[change[0]], runs[name_of(change)]
    assert len(curve(stage, "loss")) == UPDATES
    assert curve(stage, "loss")[:HALF] == curve(reference, "loss")[:HALF]
    for number in ("loss", "grad_norm"):
        np.testing.assert_allclose(curve(stage, number), curve(reference, number), rtol=1e-6)
    assert curve(stage, "lr") == curve(reference, "lr")
    expected, weights = (load_file(s.directory / "weights.safetensors") for s in (reference, stage))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_the_undisturbed_runs_are_alike(runs):
    for zero in ZERO[1:]:
        np.testing.assert_allclose(curve(runs[zero], "loss"), curve(runs["zero0"], "loss"), rtol=1e-6)
