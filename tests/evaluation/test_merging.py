"""Views and their merging against the official test loop's recorded results."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.config.sizes import SIZES
from mvd.data.on_device import MEAN, STD
from mvd.data.video.errors import UnreadableVideo
from mvd.evaluation.merging import Merged, merge_views
from mvd.evaluation.views_of_file import test_views as views_of

FOLDER = Path(__file__).parents[1] / "golden"
VIEWS = np.load(FOLDER / "data_views.npz")
FACTS = json.loads((FOLDER / "merge.json").read_text())["k400_like_50x15_fp32"]


@pytest.mark.parametrize("sampling, section, clips", [("dense", "k400_test", 5), ("segment", "ssv2_test", 2)])
def test_views_golden(real_videos, sampling, section, clips):
    views = views_of(real_videos["bikes"], sampling, clips)
    assert views.shape == (clips * 3, 3, 16, 224, 224) and views.dtype == torch.float32
    for number, view in enumerate(views):
        name = f"bikes.mp4/{section}/chunk{number // 3}_split{number % 3}"
        np.testing.assert_allclose(view[:, ::5, ::37, ::41], VIEWS[f"{name}/slice"], atol=1e-5)
        np.testing.assert_allclose(view[:, 0, 111, 100:124], VIEWS[f"{name}/row"], atol=1e-5)
        assert float(view.double().mean()) == pytest.approx(VIEWS[f"{name}/stats"][1], abs=1e-5)


@pytest.mark.parametrize("sampling, section, clips", [("dense", "k400_test", 5), ("segment", "ssv2_test", 2)])
def test_views_are_bit_equal_before_they_are_normalised(real_videos, sampling, section, clips):
    """Denormalised to 0 to 255, the official values are integers, and ours are equal."""

    def levels(normalised: np.ndarray) -> np.ndarray:
        exact = (normalised * np.reshape(STD, (3, 1, 1, 1)) + np.reshape(MEAN, (3, 1, 1, 1))) * 255
        np.testing.assert_allclose(exact, exact.round(), atol=1e-3)
        return exact.round()

    for number, view in enumerate(views_of(real_videos["bikes"], sampling, clips).numpy()):
        official = VIEWS[f"bikes.mp4/{section}/chunk{number // 3}_split{number % 3}/slice"]
        np.testing.assert_array_equal(levels(view[:, ::5, ::37, ::41]), levels(official))


def test_views_of_the_tiny_size(motion_root):
    path = motion_root / "val" / "00000.mp4"
    views = views_of(path, "dense", clips=5, stride=1, clip=SIZES["tiny"].clip)
    assert views.shape == (15, 3, 16, 48, 48)


def test_views_of_a_missing_video():
    with pytest.raises(UnreadableVideo, match="/nowhere/x.mp4 cannot be read"):
        views_of("/nowhere/x.mp4", "dense", 5)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    arrays = dict(np.load(FOLDER / "merge_k400_like_50x15_fp32.npz"))
    numbers = np.arange(len(arrays["logits"]))
    return {**arrays, "videos": numbers % 50, "views": numbers // 50}


def test_merge_golden(recorded):
    merged = merge_views(recorded["logits"], recorded["videos"], recorded["views"], recorded["labels"])
    probabilities, top1, top5 = merged
    np.testing.assert_allclose(probabilities, recorded["merged_probs"], atol=1e-6)
    assert (top1, top5) == (FACTS["official"]["top1"], FACTS["official"]["top5"])


def test_ids_labels_order_and_duplicates_do_not_matter(recorded):
    logits, videos, views = recorded["logits"], recorded["videos"], recorded["views"]
    expected = merge_views(logits, videos, views, recorded["labels"])
    order = np.random.default_rng(0).permutation(len(logits))
    again = np.concatenate([order, order[:6]])
    names = [f"video_{number:03d}" for number in videos[again]]
    view_names = [f"chunk{view // 3}-split{view % 3}" for view in views[again]]
    spoiled = torch.from_numpy(logits[again].copy())
    spoiled[-6:] = 0  # only the later copies are ignored
    forms = [
        {f"video_{number:03d}": int(label) for number, label in enumerate(recorded["labels"])},
        torch.from_numpy(recorded["labels"][videos[again]]),
        recorded["labels"].tolist(),
    ]
    for labels in forms:
        same(merge_views(spoiled, names, view_names, labels), expected)


def same(one: Merged, other: Merged) -> None:
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-12)
    assert one[1:] == other[1:]


def test_probabilities_are_averaged_not_logits():
    logits = np.array([[9.0, 0.0], [-4.0, 0.0], [-4.0, 0.0]])
    probabilities, top1, top5 = merge_views(logits, [5, 5, 5], [0, 1, 2], {5: 1})
    assert (top1, top5) == (100.0, 100.0) and probabilities[0, 1] > 0.6
    assert logits.mean(axis=0).argmax() == 0


def test_a_tie_goes_to_the_lower_class():
    assert merge_views(np.zeros((1, 3)), ["a"], [0], {"a": 0}).top1 == 100.0
    assert merge_views(np.zeros((1, 3)), ["a"], [0], {"a": 1}).top1 == 0.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 3)), ["a"], [0, 1], {"a": 0}), "must have one row per view"),
        ((np.zeros((0, 3)), [], [], []), "must have one row per view"),
        ((np.array([[0.0, np.nan]]), ["a"], [0], {"a": 0}), "video .*a.* are not finite"),
        ((np.zeros((2, 3)), ["a", "b"], [0, 0], {"a": 0}), "'b' has no label"),
        ((np.zeros((2, 3)), ["a", "a"], [0, 1], [0, 1]), "'a'.* different labels"),
        ((np.zeros((3, 3)), ["a", "a", "b"], [0, 1, 0], [0]), "1 labels for 2 videos of 3 views"),
    ],
)
def test_what_cannot_be_merged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_views(*arguments)
