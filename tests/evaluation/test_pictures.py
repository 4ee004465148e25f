"""Pictures of clips with features as colours, of mixed clips and of mistakes."""

import numpy as np
import pytest
import torch

from mvd.config import SIZES
from mvd.evaluation.pictures import (
    NO_PREDICTION,
    Attempt,
    Distilled,
    Mistake,
    distillation_picture,
    label_weights,
    mistakes_picture,
    mixed_picture,
    principal_colours,
)

CLIP = SIZES["tiny"].clip


def test_the_main_direction_of_the_targets_is_the_first_colour():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    place = torch.linspace(-1, 1, 400)
    targets = 10 * place[:, None] * direction + 0.01 * torch.randn(400, 32, generator=generator) + 5
    red = principal_colours(targets, targets)[0][:, 0].double()
    assert abs(np.corrcoef(red, place)[0, 1]) > 0.99 and red.min() == 0 and red.max() == 255


def test_perfect_predictions_have_the_colours_of_the_targets_and_drawing_uses_no_random_numbers():
    features = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    targets, predictions = principal_colours(features, features[20:])
    assert torch.equal(targets[20:], predictions) and torch.equal(torch.get_rng_state(), state)


def test_predictions_are_drawn_at_the_masked_tokens_and_grey_elsewhere():
    tokens, patch = CLIP.tokens, CLIP.patch_size
    mask = torch.arange(tokens) % 4 > 0
    features = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(2))
    seen = Distilled(torch.zeros(3, 16, 48, 48), mask, (features[mask],) * 2, (features,) * 2)
    picture = distillation_picture(seen, CLIP)
    side, pitch = 2 * CLIP.image_size, 2 * CLIP.image_size + 4
    top = 4 + 2 * (16 + side + 4) + 16  # the strip of targets; that of predictions is below it
    target, predicted = (picture[y : y + side, 4 : 4 + side] for y in (top, top + 16 + side + 4))
    assert (predicted[: 2 * patch, : 2 * patch] == NO_PREDICTION).all()
    assert (predicted[:, 2 * patch :] != NO_PREDICTION).any()
    assert np.array_equal(predicted[:, 2 * patch : 8 * patch], target[:, 2 * patch : 8 * patch])
    assert picture.shape[0] == 4 + 6 * (16 + side + 4) and picture.shape[1] == 4 + 8 * pitch


@pytest.mark.parametrize(
    ("target", "names", "expected"),
    [
        ([0.0125, 0.3325, 0.6425, 0.0125], ["left", "right", "up", "down"], "64% up + 33% right"),
        ([0.9, 0.05, 0.05], None, "90% class 0"),
    ],
)
def test_labels_are_named_with_their_weights(target, names, expected):
    assert label_weights(torch.tensor(target), names) == expected


def test_clips_of_all_names_can_be_drawn():
    video, targets = torch.zeros(2, 3, 16, 48, 48), torch.eye(2)
    names = ["clockwise", "\u4e0a \u2190 \u00fc"]
    assert mixed_picture(video, targets, names).dtype == np.uint8
    pixels = torch.full((3, 16, 48, 48), 7, dtype=torch.uint8)
    assert (mistakes_picture([Mistake(pixels, "a.mp4", 0, 1, 0.875)], names) == 7).any()


def test_failures_are_one_warning(caplog):
    attempt = Attempt("pictures of clips")
    assert [attempt(lambda: 1 / 0), attempt(lambda: 3), attempt(lambda: 1 / 0)] == [None, 3, None]
    (record,) = caplog.records
    assert record.getMessage() == (
        "no pictures of clips, training continues without them: ZeroDivisionError: division by zero"
    )
