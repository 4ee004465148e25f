"""Frame numbers equal the official classes', seeded draws included."""

import json
from pathlib import Path

import numpy as np
import pytest

from mvd.data.clip import frame_sampling as sampling

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "temporal_spatial_sampling.json").read_text())


class Legacy:
    """numpy's old global generator, which the golden numbers were drawn from, behind a Generator's names."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def integers(self, low: int, high: int | None = None) -> int:
        return self._state.randint(low, high)


def cases(section: str, seeds: str = "seeds") -> list:
    return [
        pytest.param(int(length), int(seed), indices, id=f"L{length}-seed{seed}")
        for length, facts in GOLDEN[section].items()
        for seed, indices in facts[seeds].items()
    ]


@pytest.mark.parametrize("length, seed, expected", cases("a_pretrain_sampler"))
def test_pretrain_golden(length, seed, expected):
    assert sampling.pretrain_indices(length, Legacy(seed)).tolist() == expected


@pytest.mark.parametrize("length, seed, expected", cases("b_k400_train_dense"))
def test_dense_train_golden(length, seed, expected):
    assert sampling.dense_train_indices(length, Legacy(seed)).tolist() == expected


@pytest.mark.parametrize("length, seed, expected", cases("d_ssv2", "train_seeds"))
def test_segment_train_golden(length, seed, expected):
    assert sampling.segment_train_indices(length, Legacy(seed)).tolist() == expected


@pytest.mark.parametrize("length", [10, 40, 100, 300])
def test_dense_test_golden(length):
    assert sampling.dense_test_indices(length).tolist() == GOLDEN["c_k400_test"][str(length)]["clips"]


@pytest.mark.parametrize("length", [12, 40, 48, 100])
def test_segment_test_golden(length):
    assert sampling.segment_test_indices(length).tolist() == GOLDEN["d_ssv2"][str(length)]["test_clips"]


@pytest.mark.parametrize("length", [100, 300])
def test_random_starts_cover_the_official_range(length):
    rng = np.random.default_rng(0)
    starts = [sampling.pretrain_indices(length, rng)[0] for _ in range(4000)]
    assert (min(starts), max(starts)) == (0, length - 64)
    dense = np.array([sampling.dense_train_indices(length, rng) for _ in range(4000)])
    facts = GOLDEN["b_k400_train_dense"][str(length)]
    assert dense[:, 0].min() == facts["first_min"] and dense[:, 0].max() == facts["first_max"]
    assert dense[:, -1].min() == facts["last_min"] and dense[:, -1].max() == facts["last_max"]
    counts = np.bincount(starts, minlength=length - 63)
    expected = 4000 / (length - 63)
    assert ((counts - expected) ** 2 / expected).sum() < 1.4 * len(counts)  # chi-squared, uniform starts


def assert_uniform(draws: np.ndarray, low: int, high: int) -> None:
    """Every whole number from low to high comes, and none by far too seldom or too often."""
    counts = np.bincount(draws - low, minlength=high - low + 1)
    assert draws.min() == low and draws.max() == high
    expected = len(draws) / len(counts)
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)


@pytest.mark.parametrize("length", [65, 100, 300])
def test_the_end_of_a_dense_clip_is_uniform(length):
    """From frame 64 to the last but one; frame L-1 is never the clip's, so the ends are L-64 (QUIRKS 5)."""
    rng = np.random.default_rng(1)
    last = np.array([sampling.dense_train_indices(length, rng)[-1] for _ in range(6000)])
    assert_uniform(last, 63, length - 2)


@pytest.mark.parametrize("length", [65, 100, 300])
def test_the_start_of_a_pretraining_clip_is_uniform(length):
    rng = np.random.default_rng(2)
    starts = np.array([sampling.pretrain_indices(length, rng)[0] for _ in range(6000)])
    assert_uniform(starts, 0, length - 64)


@pytest.mark.parametrize("length", [40, 100])
def test_the_frame_of_a_segment_is_uniform(length):
    rng = np.random.default_rng(3)
    drawn = np.array([sampling.segment_train_indices(length, rng) for _ in range(6000)])
    for frames, (low, high) in zip(
        drawn.T, GOLDEN["d_ssv2"][str(length)]["train_segment_bounds_inclusive"], strict=True
    ):
        assert_uniform(frames, low, high)


@pytest.mark.parametrize("length", [12, 40, 48, 100])
def test_random_segments_cover_the_official_bounds(length):
    rng = np.random.default_rng(0)
    drawn = np.array([sampling.segment_train_indices(length, rng) for _ in range(2000)])
    bounds = np.array(GOLDEN["d_ssv2"][str(length)]["train_segment_bounds_inclusive"])
    np.testing.assert_array_equal(drawn.min(axis=0), bounds[:, 0])
    np.testing.assert_array_equal(drawn.max(axis=0), bounds[:, 1])


def test_a_short_pretraining_video_reaches_frame_60_only_with_62_frames():
    last = [sampling.pretrain_indices(length, np.random.default_rng(0))[-1] for length in (60, 61, 62, 64)]
    assert last == [56, 56, 60, 60]


def test_one_clip_is_the_middle_window():
    assert sampling.dense_test_indices(300, clips=1)[0, 0] == 4 * ((75 - 16) // 2)
    assert sampling.segment_test_indices(16, clips=1).shape == (1, 16)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 24])
def test_small_geometry_stays_within_the_video(length):
    rng = np.random.default_rng(0)
    results = [
        sampling.pretrain_indices(length, rng, frames=8, stride=2)[None],
        sampling.dense_train_indices(length, rng, frames=8, stride=1)[None],
        sampling.segment_train_indices(length, rng, frames=8)[None],
        sampling.dense_test_indices(length, clips=3, frames=8, stride=1),
        sampling.segment_test_indices(length, clips=3, frames=8),
    ]
    for indices in results:
        assert indices.shape[1] == 8 and indices.dtype == np.int64
        assert indices.min() >= 0 and indices.max() < length
        assert (np.diff(indices, axis=1) >= 0).all()


def test_unit_stride_takes_consecutive_frames():
    rng = np.random.default_rng(0)
    for _ in range(20):
        for sampler in (sampling.pretrain_indices, sampling.dense_train_indices):
            assert np.diff(sampler(24, rng, frames=16, stride=1)).tolist() == [1] * 15


@pytest.mark.parametrize("name", ["pretrain", "dense_train", "segment_train", "dense_test", "segment_test"])
def test_a_video_without_frames_is_refused(name):
    arguments = (np.random.default_rng(0),) if "test" not in name else ()
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        getattr(sampling, f"{name}_indices")(0, *arguments)
