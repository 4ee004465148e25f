import json
from pathlib import Path

import numpy as np
import pytest

from mvd.config.sizes import SIZES, ClipShape
from mvd.data.clip.masking import random_mask, tube_mask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "augmentation.json").read_text())


@pytest.mark.parametrize("seed, visible", GOLDEN["tube_mask_visible_positions_npseed"].items())
def test_tube_mask_golden(seed, visible):
    mask = tube_mask(np.random.RandomState(int(seed)), ClipShape(), 0.9)
    slices = mask.reshape(8, 196)
    assert np.flatnonzero(~slices[0]).tolist() == visible
    assert (slices == slices[0]).all() and mask.sum() == 8 * 176


def test_tiny_and_image_masks_hide_the_rounded_down_share():
    rng = np.random.default_rng(0)
    assert tube_mask(rng, SIZES["tiny"].clip, 0.9).sum() == 8 * 14  # of 16 positions
    assert random_mask(rng, 196, 0.75).sum() == 147


def test_every_position_is_masked_equally_often():
    rng = np.random.default_rng(0)
    share = np.mean([random_mask(rng, 36, 0.75) for _ in range(4000)], axis=0)
    assert np.abs(share - 0.75).max() < 0.03
