"""DeepSpeed's ZeRO stages against each other on two real processes, and the files of ds_configs."""

import json
import shutil
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvd.batch import Batch
from mvd.config import ConfigError
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.models import build_student
from mvd.models.checkpoints import to_official
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train import engine as engine_module
from mvd.train.engine import build_engine, full_state_dict, load_deepspeed_config
from tests.runs import UPDATES, curve, small_stage, succeed, write_stage

ZERO = ("zero0", "zero1", "zero2", "zero3", "sharded")

# A model this small is only sharded where nothing is too small for it.
SHARDED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def run_all(folder: Path) -> None:
    engine_module.DS_CONFIGS = folder / "ds_configs"
    for path in sorted(folder.glob("*/stage.yaml")):
        run_stage(Stage.from_yaml(path))
    gather_shards(folder)


def gather_shards(folder: Path) -> None:
    process = start_processes()
    torch.manual_seed(5)
    model = build_student("tiny", teacher="tiny")
    before = to_official(model)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = build_engine(model, optimizer, "sharded", Batch(1, 1, 2), "fp32")
    held = {name: parameter.numel() for name, parameter in model.named_parameters()}
    after = full_state_dict(engine)
    if process.is_first:
        changed = [name for name in before if not torch.equal(before[name], after.get(name, torch.empty(0)))]
        write_json(folder / "first.json", {"held": sum(held.values()), "changed": changed})
    else:
        write_json(folder / "second.json", {"gathered": sorted(after)})
    engine.destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    """Name -> finished run: one epoch of pre-training under every ZeRO stage."""
    folder = tmp_path_factory.mktemp("engine")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})
    stages = {
        name: small_stage("pretrain", name, folder, motion_root, teachers, deepspeed=name, epochs=1) for name in ZERO
    }
    for stage in stages.values():
        write_stage(stage)
    succeed(run_all, folder)
    return stages


@pytest.mark.parametrize("name", ZERO)
def test_every_zero_stage_trains_alike(runs, name):
    reference, stage = runs["zero1"], runs[name]
    for curve_name in ("loss", "image_loss", "video_loss", "grad_norm"):
        assert len(curve(stage, curve_name)) == UPDATES // 2
        np.testing.assert_allclose(curve(stage, curve_name), curve(reference, curve_name), rtol=1e-5)
    expected, weights = (load_file(s.directory / "weights.safetensors") for s in (reference, stage))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_shards_are_gathered_on_the_first_process(runs):
    folder = runs["zero1"].directory.parent
    assert json.loads((folder / "first.json").read_text()) == {"held": 0, "changed": []}
    assert json.loads((folder / "second.json").read_text()) == {"gathered": []}


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "optimizer", "bf16"])
def test_a_configuration_that_sets_what_the_row_decides_is_refused(tmp_path, monkeypatch, key):
    write_json(tmp_path / "mine.json", {"zero_optimization": {"stage": 1}, key: 1})
    monkeypatch.setattr(engine_module, "DS_CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match=f"mine.json sets {key}"):
        load_deepspeed_config("mine")


def test_an_unknown_or_broken_configuration_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("{")
    monkeypatch.setattr(engine_module, "DS_CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="use one of mine"):
        load_deepspeed_config("zero9")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_deepspeed_config("mine")


@pytest.mark.parametrize("path", sorted(engine_module.DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_ones_that_deepspeed_takes(path):
    config = load_deepspeed_config(path.stem)
    parsed = deepspeed.DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    assert parsed.zero_optimization_stage == int(path.stem.removesuffix("_offload")[-1])
