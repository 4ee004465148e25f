"""One real update of every pre-training and every different fine-tuning at its real size: `pytest -m fullsize`.

Through the loop and the engine, on a clip or two of a real video, in one process each, which has to stay within
22 GB. The figures of each case are printed with -rP; benchmarks/README.md has them.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.real_size import Recipe, recipes, with_batch
from mvd.config import Finetune, Pretrain
from mvd.config.run_settings import DatasetPaths
from mvd.stage import Execution, Stage
from tests.runs import write_stage

MEMORY_GB = 22
SAMPLES = {Pretrain: 1, Finetune: 2}
RECIPES = recipes()
# With ZeRO-1's second copy of weights and gradient, and both teachers, this one would take some 25 GB by count.
ZERO = {"pretrain-vith_from_vith_e800": "zero0"}

pytestmark = pytest.mark.fullsize


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory) -> Iterator[Callable[[str], dict[str, str]]]:
    """Both teachers' files of a size, with random weights; one size at a time, since they take 5 GB for ViT-H."""
    root = tmp_path_factory.mktemp("teachers")

    def make(size: str) -> dict[str, str]:
        folder = root / size
        if not folder.exists():
            for old in root.iterdir():
                shutil.rmtree(old)
            folder.mkdir()
            subprocess.run([sys.executable, "-m", "benchmarks.real_size", size, str(folder)], check=True)
        return {role: str(folder / f"{role}_{size}.safetensors") for role in ("image_teacher", "video_teacher")}

    yield make
    shutil.rmtree(root)


@pytest.fixture
def videos(tmp_path, real_videos) -> Path:
    """A data set of three real clips."""
    lines = "".join(f"{path} {label}\n" for label, path in enumerate(real_videos.values()))
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(lines)
    return tmp_path


def small_batch(recipe: Recipe) -> Recipe:
    """Two clips at most: in fine-tuning two videos, which are mixed, without augmented copies."""
    recipe = with_batch(recipe, SAMPLES[type(recipe)])
    if isinstance(recipe, Pretrain):
        return recipe
    return dataclasses.replace(recipe, augmentation=dataclasses.replace(recipe.augmentation, samples=1))


@pytest.mark.parametrize("name", RECIPES)
def test_one_update(name, tmp_path, videos, teacher_files):
    recipe = small_batch(RECIPES[name])
    distils = isinstance(recipe, Pretrain)
    stage = Stage(
        kind="pretrain" if distils else "finetune",
        id=name,
        recipe=recipe,
        inputs=teacher_files(recipe.teacher) if distils else {},
        execution=Execution(
            micro_batch=recipe.optimization.global_batch,
            deepspeed=ZERO.get(name, "zero1"),
            precision="fp32",
            runs=str(tmp_path),
            data=DatasetPaths(root=str(videos)),
            workers=0,
        ),
    )
    command = [sys.executable, "-m", "tests.fullsize.update", str(write_stage(stage))]
    free_port = os.environ | {"MASTER_PORT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=free_port)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {result['parameters'] / 1e6:.1f} M parameters, {stage.execution.deepspeed}, {result['values']}")
    print(f"{name}: {result['memory_gb']:.1f} GB, update in {result['seconds']:.0f} s")
    assert result["problems"] == [] and result["frozen_but_changed"] == []
    assert all(math.isfinite(value) for value in result["values"].values())
    assert result["values"]["loss"] > 0 and result["values"]["grad_norm"] > 0 and result["changed"]
    assert (result["teacher_parameters"] > 0) == distils and result["teacher_gradients"] == 0
    assert result["memory_gb"] < MEMORY_GB
