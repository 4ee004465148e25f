"""RandAugment on clips: timm's draws, Pillow's pixels, and only the region that the crop reads."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from mvd.config import ConfigError
from mvd.data.clip.crops import Box, cut
from mvd.data.randaugment.policy import (
    OPERATIONS,
    Operation,
    apply_operations,
    draw_operations,
    rand_augment_policy,
    regions,
)
from mvd.data.video.reader import open_video
from tests.data.plain_randaugment import apply_plainly, draw_argument

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "augmentation.json").read_text())
POLICY = "rand-m7-n4-mstd0.5-inc1"
EXACT = [
    *(("auto_contrast",), ("equalize",), ("invert",)),
    *(("posterize", bits) for bits in (1, 2, 4, 8)),
    *(("solarize", threshold) for threshold in (0, 77, 256)),
    *(("solarize_add", addend) for addend in (0, 77, 110)),
    *((name, f) for name in ("contrast", "color", "brightness", "sharpness") for f in (0.1, 0.37, 1.0, 1.63, 1.9)),
]
MOVED = [
    *((name, f) for name in ("shear_x", "shear_y") for f in (-0.21, 0.21, 0.3)),
    *((name, f) for name in ("translate_x_rel", "translate_y_rel") for f in (-0.315, 0.0001, 0.315, 0.999)),
]
ROTATED = [("rotate", -21.0), ("rotate", 21.0), ("rotate", 30.0)]


def pictures(height: int = 61, width: int = 83) -> np.ndarray:
    """Two frames of odd size with ramps, waves and grain, darker than white in one channel."""
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(-9, 10, (height, width, 3))
    waves = np.stack([40 + 2 * x, 130 + 70 * np.sin(x / 9) * np.cos(y / 7), 3 * y], axis=-1)
    first = np.clip(waves + grain, 3, 240)
    return np.stack([first, 20 + first[::-1] // 2]).astype(np.uint8)


def of_pillow(frames: np.ndarray, name: str, *argument: float) -> np.ndarray:
    function = getattr(auto_augment, name)
    kwargs = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
    return np.stack([np.asarray(function(Image.fromarray(frame), *argument, **kwargs)) for frame in frames])


def whole(frames: np.ndarray, *operations: Operation) -> np.ndarray:
    return apply_operations(frames, operations, Box(0, 0, *frames.shape[1:3]))


@pytest.mark.parametrize("operation", EXACT, ids=str)
def test_operations_on_levels_equal_pillows(operation):
    frames = pictures()
    np.testing.assert_array_equal(whole(frames, Operation(*operation)), of_pillow(frames, *operation))


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "contrast", "color", "sharpness"])
def test_statistics_of_odd_frames(name):
    """One level only, two levels, a frame of few pixels, and noise."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    two = np.where(noise > 200, 90, 10).astype(np.uint8)
    for frames in (np.full((1, 9, 9, 3), 130, np.uint8), two, noise[:, :3, :2], noise):
        argument = () if name in ("auto_contrast", "equalize") else (1.7,)
        np.testing.assert_array_equal(whole(frames, Operation(name, *argument)), of_pillow(frames, name, *argument))


@pytest.mark.parametrize("operation", MOVED, ids=str)
def test_shears_and_translations_are_pillows_to_a_level_in_few_pixels(operation):
    frames = pictures()
    difference = np.abs(whole(frames, Operation(*operation)).astype(int) - of_pillow(frames, *operation))
    assert difference.max() <= 1 and difference.mean() < 0.02


@pytest.mark.parametrize("operation", ROTATED, ids=str)
def test_rotations_are_pillows_but_for_the_kernel(operation):
    frames = pictures()
    difference = np.abs(whole(frames, Operation(*operation)).astype(int) - of_pillow(frames, *operation))
    assert difference.mean() < 0.7 and (difference > 4).mean() < 0.01


def test_every_frame_is_its_own_picture():
    """Statistics are of each frame, not of the clip."""
    frames = pictures()
    for name in ("auto_contrast", "equalize"):
        alone = np.concatenate([whole(frame[None], Operation(name)) for frame in frames])
        np.testing.assert_array_equal(whole(frames, Operation(name)), alone)


@pytest.mark.parametrize("seed", range(40))
def test_a_region_equals_that_part_of_the_whole_frame(seed):
    rng = np.random.default_rng(seed)
    frames = pictures()
    operations = [Operation(*(EXACT + MOVED + ROTATED)[i]) for i in rng.integers(len(EXACT + MOVED + ROTATED), size=4)]
    complete = whole(frames, *operations)
    for _ in range(4):
        height, width = rng.integers(1, 61), rng.integers(1, 83)
        box = Box(int(rng.integers(61 - height + 1)), int(rng.integers(83 - width + 1)), int(height), int(width))
        np.testing.assert_array_equal(apply_operations(frames, operations, box), cut(complete, box))


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_magnitude_equals_the_plain_operation_bit_for_bit(name, real_videos):
    """On parts of real frames, as an array and as single frames that lie apart in memory."""
    frames = open_video(real_videos["bikes"]).frames(np.array([0, 100]))[:, :120, :161]
    rng = np.random.default_rng(0)
    for magnitude in (*range(11), 6.37, 7.81):
        operation = draw_argument(name, magnitude, rng)
        expected = np.stack([apply_plainly(frame, *operation) for frame in frames])
        height, width = rng.integers(1, 120), rng.integers(1, 161)
        for box in (
            Box(0, 0, 120, 161),
            Box(int(rng.integers(121 - height)), int(rng.integers(162 - width)), int(height), int(width)),
        ):
            for given in (frames, list(frames)):
                made = np.stack(list(apply_operations(given, [operation], box)))
                np.testing.assert_array_equal(made, cut(expected, box), err_msg=f"{operation} {box}")


def test_only_the_region_is_worked_on():
    box = Box(10, 20, 12, 14)
    needed = regions([Operation("invert"), Operation("shear_x", 0.2), Operation("sharpness", 1.5)], box, (61, 83))
    assert needed[-1] == box and needed[2] == Box(9, 19, 14, 16)
    assert needed[0] == needed[1] and needed[1].height == 14 and needed[1].width < 30
    assert regions([Operation("equalize"), Operation("invert")], box, (61, 83))[0] == Box(0, 0, 61, 83)


def test_nothing_drawn_is_nothing_done():
    frames = pictures()
    np.testing.assert_array_equal(whole(frames), frames)


def test_the_clip_that_comes_in_stays_as_it_is():
    frames = pictures()
    before = frames.copy()
    for operation in EXACT + MOVED + ROTATED:
        whole(frames, Operation(*operation))
    np.testing.assert_array_equal(frames, before)


def test_the_draws_are_timms():
    """The operations that are recorded make of a picture what timm makes of it from the same state."""
    frame = pictures()[0]
    applied = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        operations = draw_operations(POLICY, rng)
        number = int(np.random.default_rng(seed).integers(2**32))
        random.seed(number)
        np.random.seed(number)
        expected = np.asarray(rand_augment_policy(POLICY)(Image.fromarray(frame)))
        made = frame[None]
        for name, argument in operations:
            takes_one = name not in ("auto_contrast", "equalize", "invert")
            made = of_pillow(made, name, *([argument] if takes_one else []))
        np.testing.assert_array_equal(made[0], expected)
        applied |= {operation.name for operation in operations}
    assert applied == set(OPERATIONS)


def test_drawing_leaves_the_process_alone():
    drawn = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)
        before = random.getstate(), np.random.get_state()[1].tolist()
        drawn.append([draw_operations(POLICY, np.random.default_rng(seed)) for seed in range(20)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert drawn[0] == drawn[1]


def test_an_operation_that_clips_lack_is_refused():
    with pytest.raises(ConfigError, match="desaturate is not implemented for clips"):
        draw_operations("rand-m9-n2-t3a-p1.0", np.random.default_rng(0))


def test_rand_augment_has_the_official_operations():
    operations = rand_augment_policy(POLICY).ops
    assert [op.name for op in operations] == GOLDEN["randaugment_facts"]["op_list"]
    for op in operations:
        expected = GOLDEN["randaugment_level_args_at_m7"][op.name]
        level = op.level_fn(7, op.hparams) if op.level_fn else ()
        if expected is None:
            assert len(level) == 0
        else:
            assert any(level[0] == pytest.approx(value) for value in expected)
        assert op.kwargs == {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
