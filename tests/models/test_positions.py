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


def code(width: int, position: int) -> np.ndarray:
    angle = position * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)])


@pytest.mark.parametrize("width", [384, 512, 640, 768, 1024, 1280])
def test_every_place_has_the_code_of_its_slice_column_and_row(width):
    """For the widths of all encoders and decoders, position by position."""
    in_space, in_time = sincos_2d(width, side=14)[0], sincos_3d(width, slices=8, side=14)[0]
    for place in range(0, 1568, 5):
        time, (row, column) = place // 196, divmod(place % 196, 14)
        spatial = [code(width * 3 // 8, column), code(width * 3 // 8, row)]
        expected = np.concatenate([code(width // 4, time), *spatial])
        np.testing.assert_allclose(in_time[place], expected, atol=1e-6)
        if time == 0:
            expected = np.concatenate([code(width // 2, column), code(width // 2, row)])
            np.testing.assert_allclose(in_space[place], expected, atol=1e-6)


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
