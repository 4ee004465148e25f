"""Crops and RandAugment against the official pipeline's recorded draws and pixels."""

import json
import random
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from mvd.config.sizes import ClipShape
from mvd.data.clip import crops as augment
from mvd.data.clip.frame_sampling import dense_train_indices, pretrain_indices, segment_train_indices
from mvd.data.clip.masking import tube_mask
from mvd.data.on_device import normalise
from mvd.data.randaugment.policy import rand_augment_policy
from mvd.data.video.reader import open_video
from tests.data.test_frame_sampling import Legacy

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "augmentation.json").read_text())
SLICES = np.load(FOLDER / "augmentation_slices.npz")
POLICY = "rand-m7-n4-mstd0.5-inc1"
ONE_LEVEL = 1 / 255 / 0.224 + 1e-5  # over the smallest standard deviation


class LegacyPython:
    """Python's generator, which the golden crops were drawn from, behind a Generator's name."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integers(self, high: int) -> int:
        return self._random.randrange(high)


def sliced(clip: np.ndarray) -> np.ndarray:
    return normalise(augment.to_clip(clip), channel_axis=0)[:, ::5, ::37, ::41].numpy()


@pytest.mark.parametrize("name", GOLDEN["pretrain_crop"])
def test_multi_scale_crop_golden(name):
    width, height = (int(part[1:]) for part in name.split("_")[:2])
    facts = GOLDEN["pretrain_crop"][name]
    sizes = augment.multi_scale_sizes(height, width, 224)
    assert [list(size) for size in sizes] == facts["crop_pairs_w_h"]
    for crop_width, crop_height in sizes:
        offsets = augment.multi_scale_offsets(height, width, crop_height, crop_width)
        assert [list(o) for o in offsets] == facts["offsets_x_y_per_pair"][f"{crop_width}x{crop_height}"]
    for seed, expected in facts["seeded_w_h_x_y"].items():
        box = augment.multi_scale_box(height, width, 224, LegacyPython(int(seed)))
        assert [box.width, box.height, box.left, box.top] == expected


def test_every_size_and_offset_of_the_multi_scale_crop_is_drawn_alike():
    """130 boxes, of which some coincide where a crop fills a side of the image."""
    height, width = 256, 340
    expected: Counter = Counter()
    for crop_width, crop_height in augment.multi_scale_sizes(height, width, 224):
        for left, top in augment.multi_scale_offsets(height, width, crop_height, crop_width):
            expected[augment.Box(top, left, crop_height, crop_width)] += 100
    rng = np.random.default_rng(0)
    drawn = Counter(augment.multi_scale_box(height, width, 224, rng) for _ in range(expected.total()))
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[box] - count) < 4.5 * np.sqrt(count) for box, count in expected.items())


@pytest.mark.parametrize("name", GOLDEN["pretrain_pipeline_seeded"])
def test_pretraining_pipeline_golden(name, real_videos):
    seed, teacher_size = int(name[-1]), int(name.split("/")[2].removeprefix("teacher"))
    video = open_video(real_videos[{"video0": "bikes", "video1": "bigbuckbunny"}[name.split("/")[1]]])
    numpy_draws = Legacy(seed)
    frames = video.frames(pretrain_indices(len(video), numpy_draws))
    box = augment.multi_scale_box(*frames.shape[1:3], 224, LegacyPython(seed))
    for role, size in (("student", 224), ("teacher", teacher_size)):
        clip = augment.resize_smoothly(augment.cut(frames, box), size)
        np.testing.assert_allclose(sliced(clip), SLICES[f"{name}/{role}/slice"], atol=ONE_LEVEL)
    mask = tube_mask(numpy_draws._state, ClipShape(), 0.9)
    np.testing.assert_array_equal(np.packbits(mask), SLICES[f"{name}/mask"])


def test_crops_near_the_input_size_snap_to_it():
    assert (224, 224) in augment.multi_scale_sizes(300, 300, 224)  # 0.75 of 300 is 225
    assert (192, 192) in augment.multi_scale_sizes(256, 256, 48)


@pytest.mark.parametrize(("height", "width"), [(222, 300), (300, 223)])
def test_a_crop_that_is_larger_than_the_image_is_black_outside_of_it(height, width):
    """As Pillow's; its size snaps to that of the input."""
    rng = np.random.default_rng(0)
    frames = rng.integers(1, 256, (2, height, width, 3), dtype=np.uint8)
    boxes = {augment.multi_scale_box(height, width, 224, rng) for _ in range(300)}
    assert any(box.top < 0 or box.left < 0 for box in boxes)
    for box in boxes:
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        expected = np.stack([np.asarray(Image.fromarray(frame).crop(corners)) for frame in frames])
        np.testing.assert_array_equal(augment.cut(frames, box), expected)
        np.testing.assert_array_equal(np.stack(list(augment.cut(list(frames), box))), expected)


@pytest.mark.parametrize("name", GOLDEN["finetune_augmentation_seeded"])
def test_finetuning_pipeline_golden(name, real_videos):
    """Operations, arguments, crop and flip of the first sample, and its pixels outside the erased box."""
    facts, seed = GOLDEN["finetune_augmentation_seeded"][name], int(name[-1])
    video = open_video(real_videos["bikes"])
    sampler = segment_train_indices if "SSV2" in name else dense_train_indices
    numpy_draws = Legacy(seed)
    frames = video.frames(sampler(len(video), numpy_draws))
    after_sampling = numpy_draws._state.get_state()
    applied: list[str] = []
    augmented = []
    with mock.patch.object(AugmentOp, "__call__", recording(applied)):
        for frame in frames:
            random.seed(seed)
            np.random.set_state(after_sampling)
            augmented.append(np.asarray(rand_augment_policy(POLICY)(Image.fromarray(frame))))
    assert applied == [op["op"] for op in facts["ops_sample0"]] * len(frames)
    top, left, height, width = facts["crops_i_j_h_w"][0]
    clip = augment.resize_bilinear(augment.cut(np.stack(augmented), augment.Box(top, left, height, width)), 224)
    if "Kinetics" in name and facts["flips"][0]:
        clip = clip[:, :, ::-1]
    expected = SLICES[f"{name}/sample0/slice"]
    rounding = 0.5 / 255 / 0.224 + 1e-5  # half a level, over the smallest standard deviation
    same = np.abs(sliced(clip) - expected) <= rounding
    erased = rectangle_of(~same)
    assert facts["erase_sample0"] or same.all()
    assert same[:, :, ~erased].all() and erased.mean() < 0.6


def recording(names: list[str]):
    original = AugmentOp.__call__

    def call(self, image):
        names.append(self.name)
        return original(self, image)

    return call


def rectangle_of(different: np.ndarray) -> np.ndarray:
    """(H, W) bool: the smallest rectangle that holds every difference of (3, T, H, W)."""
    rectangle = np.zeros(different.shape[2:], bool)
    rows, columns = (np.flatnonzero(different.any(axis=axes)) for axes in ((0, 1, 3), (0, 1, 2)))
    if len(rows):
        rectangle[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return rectangle


def test_bilinear_crop_equals_torch_interpolation_to_half_a_level():
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
    box = augment.Box(5, 9, 50, 33)
    crop = torch.from_numpy(frames[:, 5:55, 9:42]).permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(crop, (48, 48), mode="bilinear", align_corners=False)
    ours = augment.resize_bilinear(augment.cut(frames, box), 48)
    assert np.abs(ours - exact.permute(0, 2, 3, 1).numpy()).max() <= 0.501


@pytest.mark.parametrize("video", ["bikes", "bigbuckbunny"])
@pytest.mark.parametrize("side", [100, 168, 192, 224, 256])
def test_smooth_resizing_is_pillows_to_a_level_in_a_few_pixels(video, side, real_videos):
    frames = augment.cut(open_video(real_videos[video]).frames(np.array([0, 60])), augment.Box(8, 40, side, side + 9))
    pillow = [Image.fromarray(frame).resize((224, 224), Image.Resampling.BILINEAR) for frame in frames]
    difference = augment.resize_smoothly(frames, 224).astype(int) - np.stack(pillow)
    assert np.abs(difference).max() <= 2
    assert (difference != 0).mean() < 0.2 and abs(difference.mean()) < 0.002


def test_random_resized_boxes_fill_their_range_and_fit():
    rng = np.random.default_rng(0)
    boxes = [augment.random_resized_box(240, 240, (0.08, 1.0), (0.75, 1.3333), rng) for _ in range(3000)]
    shares = np.array([box.height * box.width for box in boxes]) / 240**2
    aspects = np.array([box.width / box.height for box in boxes])
    assert all(0 <= b.top <= 240 - b.height and 0 <= b.left <= 240 - b.width for b in boxes)
    assert 0.075 < shares.min() < 0.1 and shares.max() > 0.9
    assert 0.73 < aspects.min() < 0.77 and 1.3 < aspects.max() < 1.36
    assert abs(np.log(aspects).mean()) < 0.03


def test_random_resized_box_of_an_extreme_image_is_central():
    wide = augment.random_resized_box(10, 1000, (1.0, 1.0), (0.75, 4 / 3), np.random.default_rng(0))
    assert wide == (0, 493, 10, 13)
    tall = augment.random_resized_box(1000, 10, (1.0, 1.0), (0.75, 4 / 3), np.random.default_rng(0))
    assert tall == (493, 0, 13, 10)


def test_erase_boxes_follow_the_official_shares():
    rng = np.random.default_rng(0)
    boxes = [augment.erase_box(224, 0.25, rng) for _ in range(8000)]
    drawn = [box for box in boxes if box.height]
    shares = np.array([box.height * box.width for box in drawn]) / 224**2
    aspects = np.array([box.height / box.width for box in drawn])
    assert abs(len(drawn) / len(boxes) - 0.25) < 0.02
    assert 0.018 < shares.min() < 0.025 and 0.32 < shares.max() < 0.336
    assert 0.28 < aspects.min() < 0.32 and 3.1 < aspects.max() < 3.6
    assert all(box.top + box.height <= 224 and box.left + box.width <= 224 for box in drawn)
