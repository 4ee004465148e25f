"""The picture of what a row sees."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mvd.config import Mixing
from mvd.config.run_settings import DatasetPaths
from mvd.config.sizes import SIZES
from mvd.data import inspect
from mvd.data.annotations import load_annotations
from mvd.data.on_device import normalise
from tests.data.stages import PLAIN, recipe


@pytest.fixture
def entries(motion_root):
    return load_annotations(DatasetPaths(root=str(motion_root)), "train", 8)


def test_hidden_tokens_are_grey_and_the_others_as_they_are(entries):
    clip, seen = inspect.pretrain_strips(recipe("pretrain"), entries, 1, 0)
    assert clip.frames.shape == seen.frames.shape == (8, 48, 48, 3)
    hidden = (seen.frames == inspect.HIDDEN).all(axis=-1)
    assert np.array_equal(seen.frames[~hidden], clip.frames[~hidden])
    patches = hidden.reshape(8, 4, 12, 4, 12).mean(axis=(2, 4))
    assert set(patches.flatten()) <= {0.0, 1.0} and (patches == patches[0]).all()
    assert (patches[0] == 1).sum() == 14 and "88 % is masked" in seen.title


def test_tokens_cover_their_tubelets():
    mask = torch.zeros(128, dtype=torch.bool)
    mask[1 * 16 + 2 * 4 + 3] = True  # second slice, third row, fourth column
    pixels = inspect.token_pixels(mask, SIZES["tiny"].clip)
    assert pixels.sum() == 2 * 12 * 12 and pixels[2:4, 24:36, 36:48].all()


def test_mixed_clips_carry_their_weights(entries):
    made = recipe("finetune", augmentation=PLAIN, mixing=Mixing(group=8, smoothing=0.0, cutmix=0.0))
    strips = list(inspect.finetune_strips(made, entries, 1, 0))
    assert len(strips) == 4 and all(" + " in strip.title for strip in strips)
    shares = [float(strip.title.split("target ")[1].split(" x")[0]) for strip in strips]
    assert shares == [shares[0]] * 4 and 0.5 <= shares[0] <= 1


def test_levels_survive_normalising():
    clip = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    shown = inspect.denormalised(normalise(clip[None])[0])
    assert np.array_equal(shown, clip.permute(1, 2, 3, 0).numpy())


def test_the_command_writes_a_picture_of_all_stages(motion_root, tmp_path):
    command = [sys.executable, "-m", "mvd.data.inspect", "demo", "--data", str(motion_root), "--videos", "2"]
    result = subprocess.run([*command, "--output", str(tmp_path / "seen.png")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "seen.png") as picture:
        strips = 2 * 2 + 2 + 15  # two of each video; the two of a mixed pair; the views
        assert picture.height == strips * (inspect.LINE + 48 + inspect.GAP) + inspect.GAP
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_row"], "there is no row 'no_such_row'"),
        (["vitb_from_vitb_k400"], "where the data set k400 lies is not said; give --data FOLDER"),
        (["demo", "--data", "nowhere"], "nowhere/train.csv does not exist"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(arguments, message, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mvd.data.inspect", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
