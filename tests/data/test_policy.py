"""The recipes' RandAugment policy judged by what it makes of pixels, against Pillow's operations written out here.

`rand-m7-n1-mstd0-inc1-p1.0` is the recipes' policy with one operation a clip, always applied, at magnitude 7 exactly:
its outcome must be that of one of 15 operations with one of the official arguments.
"""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mvd.data.clip.crops import Box
from mvd.data.randaugment.policy import apply_operations, draw_operations
from tests.official import golden

POLICY = "rand-m7-n4-mstd0.5-inc1"
ONE_OPERATION = "rand-m7-n1-mstd0-inc1-p1.0"
LEVELS: dict[str, list[float] | None] = golden("augmentation.json")["randaugment_level_args_at_m7"]
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def augmented(frames: np.ndarray, policy: str, seed: int | np.random.Generator) -> np.ndarray:
    """One draw, applied to whole frames."""
    drawn = draw_operations(policy, np.random.default_rng(seed))
    return apply_operations(frames, drawn, Box(0, 0, *frames.shape[1:3]))


def apply_operation(image: Image.Image, name: str, level: float | None) -> Image.Image:
    """One official operation with its argument; geometric ones interpolate bicubically and fill with grey."""
    width, height = image.size
    affine = {
        "ShearX": (1, level, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, level, 1, 0),
        "TranslateXRel": (1, 0, (level or 0) * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, (level or 0) * height),
    }
    filled = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], **filled)
    if name == "Rotate":
        return image.rotate(level, **filled)
    if name == "PosterizeIncreasing":
        return ImageOps.posterize(image, int(level))
    if name == "SolarizeIncreasing":
        return ImageOps.solarize(image, int(level))
    if name == "SolarizeAdd":
        return image.point([min(255, value + int(level)) if value < 128 else value for value in range(256)] * 3)
    enhance = getattr(ImageEnhance, name.removesuffix("Increasing"), None)
    if enhance is not None:
        return enhance(image).enhance(level)
    return getattr(ImageOps, name.lower())(image)  # autocontrast, equalize, invert


def pictures() -> np.ndarray:
    """Two smooth pictures, of which only every operation and argument makes something of its own."""
    y, x = np.mgrid[0:96, 0:128]
    waves = [np.sin(x / 17 + y / 29 + phase) * np.cos(y / 13 - x / 41 + 2 * phase) for phase in range(3)]
    first = np.stack([60 + 0.7 * x + 55 * waves[0], 110 - 0.4 * y + 70 * waves[1], 90 + 60 * waves[2]], axis=-1)
    return np.stack([first, first[::-1] * 0.8 + 20]).round().astype(np.uint8)


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, float | None, np.ndarray, np.ndarray]]:
    """For 360 draws: the operation and argument that fit best, what Pillow makes of them, and what came out."""
    clip = pictures()
    expected = {
        (name, level): np.stack([np.asarray(apply_operation(Image.fromarray(f), name, level)) for f in clip])
        for name, levels in LEVELS.items()
        for level in levels or [None]
    }
    found = []
    for seed in range(360):
        made = augmented(clip, ONE_OPERATION, seed)
        best = min(expected, key=lambda key: np.abs(expected[key].astype(int) - made).mean())
        found.append((*best, expected[best], made))
    return found


def test_every_outcome_is_one_of_the_official_operations_on_all_frames(outcomes):
    for name, level, expected, made in outcomes:
        difference = np.abs(expected.astype(int) - made)
        if name in GEOMETRIC:
            assert (difference > 4).mean() < 0.02 and difference.mean() < 0.5, (name, level)
        else:
            np.testing.assert_array_equal(made, expected, err_msg=f"{name} {level}")


def test_the_comparison_would_notice_a_slightly_different_argument():
    image = Image.fromarray(pictures()[0])
    for name in GEOMETRIC:
        levels = (LEVELS[name][1], LEVELS[name][1] * 1.1)
        exact, off = (np.asarray(apply_operation(image, name, level)).astype(int) for level in levels)
        assert np.abs(exact - off).mean() > 0.5, name


def test_operations_and_both_signs_are_drawn_alike(outcomes):
    names = Counter(name for name, *_ in outcomes)
    assert names.keys() == LEVELS.keys()
    expected = len(outcomes) / len(LEVELS)
    assert sum((count - expected) ** 2 / expected for count in names.values()) < 31.3  # chi-squared, 14 degrees, 0.5 %
    signs = Counter(level == LEVELS[name][0] for name, level, *_ in outcomes if LEVELS[name] and len(LEVELS[name]) == 2)
    assert abs(signs[True] - signs[False]) < 3 * np.sqrt(signs.total())


def test_magnitudes_are_spread_around_seven_with_half_a_level():
    """On black frames, what SolarizeAdd adds can be read off: 11 a level, rounded down."""
    black = np.zeros((1, 16, 16, 3), np.uint8)
    policy = ONE_OPERATION.replace("mstd0", "mstd0.5")
    frames = [augmented(black, policy, seed) for seed in range(4000)]
    added = [int(frame.max()) for frame in frames if 0 < frame.min() == frame.max() < 255]
    assert len(added) == pytest.approx(4000 / 15, rel=0.25)
    assert np.mean(added) == pytest.approx(7 * 11 - 0.5, abs=1.2)
    assert np.std(added) == pytest.approx(0.5 * 11, rel=0.2)


def test_four_operations_are_drawn_and_each_applied_half_of_the_time():
    """Noise of full range is left alone where nothing is applied but AutoContrast, which does nothing to it."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    noise[0, 0, :2] = [[0, 0, 0], [255, 255, 255]]
    made = [augmented(noise, POLICY, seed) for seed in range(1500)]
    untouched = np.mean([np.array_equal(one, noise) for one in made])
    assert untouched == pytest.approx((0.5 + 0.5 / 15) ** 4, abs=0.025)  # 0.08; three operations: 0.15, five: 0.04


def test_only_an_increasing_policy_uses_the_increasing_operations():
    """At magnitude 3 brightness becomes 0.73 or 1.27 with them, 0.64 without; "inc0" means without (QUIRKS 10)."""
    grey = np.full((1, 4, 4, 3), 100, np.uint8)

    def seen(policy: str) -> set[int]:
        made = (augmented(grey, policy, seed) for seed in range(200))
        return {int(frame.min()) for frame in made if frame.min() == frame.max()}

    with_them, without = seen("rand-m3-n1-mstd0-inc1-p1.0"), seen("rand-m3-n1-mstd0-inc0-p1.0")
    assert {73, 127} <= with_them and 64 not in with_them
    assert 64 in without and not {73, 127} & without
