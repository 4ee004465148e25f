"""Mixup and CutMix against the official entry point's recorded draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.config import ConfigError
from mvd.data.mixup import ClipMixup, Mix

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "augmentation.json").read_text())
CASES = GOLDEN["mixup_seeded_B4_T16_224"] | GOLDEN["mixup_seeded_cutmix_with_pixel_change"]
LABELS = torch.tensor([1, 2, 3, 4])


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.randn(4, 3, 16, 224, 224, generator=torch.Generator().manual_seed(4321))


def official() -> ClipMixup:
    return ClipMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)


@pytest.mark.parametrize("seed", CASES)
def test_golden(seed, clips):
    facts, mixup = CASES[seed], official()
    np.random.seed(int(seed))
    drawn = mixup.draw(224, 224)
    assert drawn.lam == pytest.approx(facts["lam_used"], abs=1e-12)
    assert (None if drawn.box is None else list(drawn.box)) == facts["bbox_yl_yh_xl_xh"]
    np.random.seed(int(seed))
    mixed, targets = mixup(clips, LABELS)
    np.testing.assert_allclose(targets, facts["targets"], atol=1e-6)
    assert float(mixed.double().sum()) == pytest.approx(facts["out_sum"], abs=1e-3)
    if "out_abs_mean" in facts:
        assert float(mixed.double().abs().mean()) == pytest.approx(facts["out_abs_mean"], abs=1e-7)
    if facts["use_cutmix"]:
        changed = mixed != clips
        assert float(changed.float().mean()) == pytest.approx(facts["changed_fraction"], abs=1e-6)


def test_official_axes_cut_frames_and_rows_spatial_axes_rows_and_columns(clips):
    mix = Mix(0.8, (7, 219, 46, 60))
    changed = official().apply(clips, LABELS, mix)[0] != clips
    assert changed[:, :, 7:, 46:60].all() and changed.sum() == changed[:, :, 7:, 46:60].sum()
    spatial = ClipMixup(num_classes=10, cutmix_axes="spatial")
    changed = spatial.apply(clips, LABELS, mix)[0] != clips
    assert changed[..., 7:219, 46:60].all() and changed.sum() == changed[..., 7:219, 46:60].sum()


def test_official_cutmix_changes_pixels_in_two_of_five_batches():
    mixup, facts = official(), GOLDEN["cutmix_5d_quirk_stats_20000"]
    mixup.mixup_alpha = 0.0
    rng = np.random.RandomState(0)
    mixes = [mixup.draw(224, 224, rng) for _ in range(5000)]
    shares = np.array([max(min(b[1], 16) - b[0], 0) * (b[3] - b[2]) / (16 * 224) for _, b in mixes])
    assert (shares > 0).mean() == pytest.approx(facts["fraction_of_cutmix_batches_with_any_pixel_replaced"], abs=0.02)
    assert shares.mean() == pytest.approx(facts["mean_replaced_pixel_fraction"], abs=0.02)
    label_weights = np.mean([1 - mix.lam for mix in mixes])
    assert label_weights == pytest.approx(facts["mean_label_weight_of_partner"], abs=0.02)


@pytest.mark.parametrize("axes", ["official", "spatial"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("copies", [1, 2])
def test_mixing_a_unit_of_mirrored_pairs_is_mixing_its_share_of_the_group(axes, seed, copies):
    videos = 8
    group = torch.randn(videos, copies, 3, 4, 12, 12)
    labels = torch.arange(videos).repeat_interleave(copies)
    mixup = ClipMixup(num_classes=videos, cutmix_axes=axes)
    mix = mixup.draw(12, 12, np.random.RandomState(seed))
    whole, targets = mixup.apply(group.flatten(0, 1), labels, mix)
    for first, last in ((0, 1), (1, 3), (3, 4), (0, 4)):
        unit = [*range(first, last), *range(videos - last, videos - first)]
        at = (torch.tensor(unit)[:, None] * copies + torch.arange(copies)).flatten()
        mixed, part = mixup.apply(group[unit].flatten(0, 1), labels[at], mix)
        assert torch.equal(mixed, whole[at]) and torch.equal(part, targets[at])


def test_the_clips_that_come_in_stay_as_they_are():
    clips = torch.randn(2, 3, 4, 8, 8)
    for mix in (Mix(0.3), Mix(0.3, (0, 3, 1, 5))):
        before = clips.clone()
        official().apply(clips, torch.tensor([0, 1]), mix)
        assert torch.equal(clips, before)


def test_without_mixing_labels_are_only_smoothed():
    clips, labels = torch.randn(2, 3, 4, 8, 8), torch.tensor([0, 1])
    mixed, targets = ClipMixup(prob=0.0, num_classes=4)(clips, labels, np.random.RandomState(0))
    assert torch.equal(mixed, clips)
    torch.testing.assert_close(targets, torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.025, 0.925, 0.025, 0.025]]))


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="clips are mixed in pairs: their number must be even, got 3"):
        official()(torch.zeros(3, 3, 2, 4, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match='mode must be "batch"'):
        ClipMixup(mode="elem")
    with pytest.raises(ConfigError, match="cutmix_axes must be .* got 'time'"):
        ClipMixup(cutmix_axes="time")
    with pytest.raises(ConfigError, match="one of them positive, got"):
        ClipMixup(mixup_alpha=0, cutmix_alpha=0)
