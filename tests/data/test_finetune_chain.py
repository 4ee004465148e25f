"""Fine-tuning's augmentation from decoded frames to clips: the official draws, pixels and orders."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvd.config import Augmentation
from mvd.data.annotations import Entry
from mvd.data.clip import crops as augment
from mvd.data.clip.frame_sampling import dense_train_indices, segment_train_indices
from mvd.data.datasets import FinetuneDataset, SampleKey, build_dataset
from mvd.data.randaugment.policy import rand_augment_policy
from mvd.data.rng import Purpose
from mvd.data.video.reader import open_video
from tests.data.stages import PLAIN, recipe, stage
from tests.data.test_crops import POLICY, SLICES, rectangle_of, sliced
from tests.data.test_frame_sampling import Legacy
from tests.data.test_policy import apply_operation, augmented
from tests.official import golden

FACTS = golden("augmentation.json")
CHAINS: dict[str, dict[str, Any]] = FACTS["finetune_augmentation_seeded"]
ROUNDING = 0.5 / 255 / 0.224 + 1e-5  # half a level, over the smallest standard deviation


class GlobalPython:
    """Python's global generator, which the official crops and boxes are drawn from, behind a Generator's names."""

    def random(self) -> float:
        return random.random()

    def uniform(self, low: float, high: float) -> float:
        return random.uniform(low, high)

    def integers(self, high: int) -> int:
        return random.randrange(high)


class CroppingPython(GlobalPython):
    """The same for a crop, in each try of which the official code draws a number of numpy's that it has no use for."""

    def uniform(self, low: float, high: float) -> float:
        if low < 0:  # the logarithm of the aspect, a try's second draw
            np.random.uniform()
        return super().uniform(low, high)


def official_frames(name: str, path: str) -> np.ndarray:
    """The 16 frames of a golden chain; leaves numpy's global state as the official sampler does."""
    video, draws = open_video(path), Legacy(int(name[-1]))
    frames = video.frames((segment_train_indices if "SSV2" in name else dense_train_indices)(len(video), draws))
    np.random.set_state(draws._state.get_state())
    return frames


@pytest.mark.parametrize("name", CHAINS)
def test_boxes_are_the_official_ones_given_the_official_draws(name, real_videos):
    """Crop, flip and erasing box of both copies, drawn in the official order from the official generators."""
    facts = CHAINS[name]
    random.seed(int(name[-1]))
    frames = official_frames(name, real_videos["bikes"])
    height, width = frames.shape[1:3]
    crops, flips, boxes = [], [], []
    for _ in range(2):
        rand_augment_policy(POLICY)(Image.fromarray(frames[0]))  # draws as often as for a clip
        box = augment.random_resized_box(height, width, (0.08, 1.0), (0.75, 1.3333), CroppingPython())
        crops.append([box.top, box.left, box.height, box.width])
        if "SSV2" not in name:
            flips.append(bool(np.random.uniform() < 0.5))
        boxes.append(augment.erase_box(224, 0.25, GlobalPython()))
    assert (crops, flips) == (facts["crops_i_j_h_w"], facts["flips"])
    top, left, tall, wide = boxes[0]
    erased = facts["erase_sample0"] and facts["erase_sample0"]["box_top_bottom_left_right"]
    assert ([top, top + tall - 1, left, left + wide - 1] if tall else []) == erased


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("copy", [0, 1])
def test_pixels_are_the_official_ones_given_the_official_draws(name, copy, real_videos):
    """Pillow's operations on whole frames, then crop, resize and flip; erasing has hidden one rectangle at most."""
    facts = CHAINS[name]
    frames = [Image.fromarray(frame) for frame in official_frames(name, real_videos["bikes"])]
    for operation in facts[f"ops_sample{copy}"]:
        if operation["applied"]:
            (level,) = operation["args"] or [None]
            frames = [apply_operation(frame, operation["op"], level) for frame in frames]
    top, left, height, width = facts["crops_i_j_h_w"][copy]
    clip = augment.resize_bilinear(augment.cut(np.stack(frames), augment.Box(top, left, height, width)), 224)
    if facts["flips"] and facts["flips"][copy]:
        clip = clip[:, :, ::-1]
    same = np.abs(sliced(clip) - SLICES[f"{name}/sample{copy}/slice"]) <= ROUNDING
    erased = rectangle_of(~same)
    assert copy == 1 or facts["erase_sample0"] or same.all()
    assert same[:, :, ~erased].all() and erased.mean() < 0.6


def test_a_sample_is_augmented_then_cropped_then_flipped(motion_root):
    """At full resolution, in this order, each copy with its own draws; erasing is left to the device."""
    settings = Augmentation(flip=0.5, erase=0.25)
    dataset = build_dataset(stage(motion_root, "finetune", augmentation=settings))
    flips = 0
    for index in range(6):
        key = SampleKey(2, index)
        sample = dataset[key]
        frames = np.stack(dataset._read(dataset.entries[index], key))
        height, width = frames.shape[1:3]
        assert width > height == 48
        for copy in range(2):
            rng = dataset.draws(key, Purpose.AUGMENT, copy)
            whole = augmented(frames, settings.auto, rng)
            box = augment.random_resized_box(height, width, settings.crop_scale, settings.crop_ratio, rng)
            clip = augment.resize_bilinear(augment.cut(whole, box), 48)
            if rng.random() < settings.flip:
                clip, flips = clip[:, :, ::-1], flips + 1
            np.testing.assert_array_equal(sample["video"][copy].permute(1, 2, 3, 0), clip)
            assert tuple(sample["erase"][copy].tolist()) == augment.erase_box(48, settings.erase, rng)
    assert 0 < flips < 12


@pytest.mark.parametrize(("flip", "least", "most"), [(0.0, 0, 0), (0.5, 18, 42), (1.0, 60, 60)])
def test_clips_are_mirrored_as_often_as_the_recipe_says(motion_root, flip, least, most):
    """Never on Something-Something, half of the time on Kinetics; all frames of a clip together."""
    settings = Augmentation(auto=None, crop_scale=PLAIN.crop_scale, crop_ratio=PLAIN.crop_ratio, flip=flip, erase=0.0)
    path = str(motion_root / "train" / "00003.mp4")
    dataset = FinetuneDataset(recipe("finetune", augmentation=settings), [Entry(path, 0)], "pyav")
    mirrored = 0
    for epoch in range(30):
        frames = np.stack(dataset._read(dataset.entries[0], SampleKey(epoch, 0)))
        left = (frames.shape[2] - 48) // 2
        frames = frames[:, :, left : left + 48]
        for clip in dataset[SampleKey(epoch, 0)]["video"].permute(0, 2, 3, 4, 1).numpy():
            as_it_is, turned = np.array_equal(clip, frames), np.array_equal(clip, frames[:, :, ::-1])
            assert as_it_is != turned
            mirrored += turned
    assert least <= mirrored <= most


def test_repeated_augmentation_is_collated_in_the_official_order():
    facts = FACTS["collate_num_sample2"]
    dataset = FinetuneDataset(recipe("finetune"), [], "pyav")
    samples = [
        {
            "video": torch.tensor([10.0 * video, 10.0 * video + 1]),
            "labels": torch.full((2,), video),
            "indices": torch.tensor([video]),
            "unreadable": [],
        }
        for video in range(3)
    ]
    batch = dataset.collate(samples)
    assert batch["video"].tolist() == facts["order"] and batch["labels"].tolist() == facts["labels"]
