import numpy as np
import pytest
import torch

from mvd.models.positions import sincos_2d, sincos_3d, sinusoid_1d
from tests.official import golden, stats


def test_video_teacher_table_matches_the_official_one():
    file = golden("pos_embed_video_teacher_base.npz")
    table = sinusoid_1d(768, 1568)[0]
    np.testing.assert_allclose(table[::97, ::31], file["slice"], atol=1e-6)
    np.testing.assert_allclose(table[[1, 1567]], np.stack([file["row1"], file["row1567"]]), atol=1e-6)
    np.testing.assert_allclose(stats(table), file["stats"], rtol=1e-5)


def test_column_comes_first_in_the_spatial_code():
    table = sincos_2d(32, side=4)[0].view(4, 4, 32)
    assert torch.equal(table[0, 2, :16], table[3, 2, :16])  # same column
    assert torch.equal(table[2, 0, 16:], table[2, 3, 16:])  # same row
    assert not torch.equal(table[0, 2, :16], table[0, 3, :16])


def test_class_token_has_a_row_of_zeros():
    table = sincos_2d(32, side=4, class_token=True)[0]
    assert torch.equal(table[0], torch.zeros(32))
    assert torch.equal(table[1:], sincos_2d(32, side=4)[0])


def test_first_quarter_of_the_3d_table_is_time():
    table = sincos_3d(64, slices=3, side=2)[0].view(3, 4, 64)
    assert torch.equal(table[1, 0, :16], table[1, 3, :16])
    assert torch.equal(table[0, :, 16:], table[2, :, 16:])
    assert not torch.equal(table[0, 0, :16], table[1, 0, :16])


def test_impossible_width_names_the_mend():
    with pytest.raises(ValueError, match="multiple of 16"):
        sincos_3d(40, slices=2, side=2)
