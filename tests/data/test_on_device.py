"""Normalising, erasing and mixing of a loader's batch."""

import pytest
import torch
from torchvision.transforms.functional import normalize

from mvd.config import Augmentation, Mixing
from mvd.data.datasets import SampleKey, build_dataset
from mvd.data.on_device import MEAN, STD, erase, normalise, prepare
from tests.data.stages import stage


def test_normalise_equals_torchvision():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(normalise(images), normalize(images.float() / 255, MEAN, STD))
    clips = torch.stack([images, images.flip(3)], dim=2)
    torch.testing.assert_close(normalise(clips)[:, :, 1], normalise(images.flip(3)))


def test_erasing_fills_one_box_of_all_frames_with_fresh_noise():
    clips = torch.full((3, 3, 16, 32, 32), 9.0)
    boxes, seeds = torch.tensor([[4, 6, 20, 10], [0, 0, 0, 0], [0, 0, 31, 31]]), torch.tensor([1, 2, 2**61])
    erase(clips, boxes, seeds)
    box = clips[0, :, :, 4:24, 6:16]
    assert (clips[1] == 9).all() and (clips[0] == 9).sum() == clips[0].numel() - box.numel()
    assert abs(float(box.mean())) < 0.05 and abs(float(box.std()) - 1) < 0.05
    assert not torch.equal(box[:, 0], box[:, 1]) and not torch.equal(box[0], box[1])
    alone = torch.full((1, 3, 16, 32, 32), 9.0)
    erase(alone, boxes[2:], seeds[2:])
    assert torch.equal(alone[0], clips[2])
    erase(alone, boxes[2:], seeds[:1])
    assert not torch.equal(alone[0], clips[2])


@pytest.mark.parametrize(
    "kind, names",
    [
        ("image_teacher", {"images", "mask"}),
        ("video_teacher", {"video", "mask"}),
        ("pretrain", {"video", "image_video", "mask"}),
        ("finetune", {"video", "targets"}),
    ],
)
def test_what_each_stage_gets(motion_root, kind, names):
    made = stage(motion_root, kind)
    dataset = build_dataset(made)
    batch = dataset.collate([dataset[SampleKey(0, index)] for index in range(4)])
    prepared = prepare(batch, made.recipe, "cpu")
    assert prepared.keys() == names
    pixels = prepared["images" if kind == "image_teacher" else "video"]
    assert pixels.dtype == torch.float32 and -2.2 < float(pixels.mean()) < 2.7
    if kind == "pretrain":
        assert prepared["image_video"] is prepared["video"]


def test_the_image_teachers_own_size_is_kept(motion_root):
    made = stage(motion_root, "pretrain", student="huge", teacher="huge")
    dataset = build_dataset(made)
    prepared = prepare(dataset.collate([dataset[SampleKey(0, 0)]]), made.recipe, "cpu")
    assert prepared["video"].shape[-1] == 224 and prepared["image_video"].shape[-1] == 196


def test_targets_are_shared_between_the_two_mixed_videos(motion_root):
    augmentation = Augmentation(auto=None, erase=0.0)
    mixing = Mixing(group=4, cutmix=0.0, smoothing=0.0)
    made = stage(motion_root, "finetune", augmentation=augmentation, mixing=mixing)
    dataset = build_dataset(made)
    labels = (0, 1, 2, 3)
    batch = dataset.collate([dataset[SampleKey(0, index, group=7)] for index in labels])
    prepared = prepare(batch, made.recipe, "cpu")
    targets, clips = prepared["targets"], normalise(batch["video"])
    lam = float(targets[0, 0])
    assert 0 < lam < 1
    for clip in range(8):
        own, partner = labels[clip // 2], labels[3 - clip // 2]
        expected = torch.zeros(8)
        expected[own], expected[partner] = lam, 1 - lam
        torch.testing.assert_close(targets[clip], expected)
        torch.testing.assert_close(prepared["video"][clip], lam * clips[clip] + (1 - lam) * clips[7 - clip])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_gpu_prepares_what_the_cpu_prepares(motion_root, kind):
    fields = {"augmentation": Augmentation(erase=0.0)} if kind == "finetune" else {}  # noise is the device's own
    made = stage(motion_root, kind, **fields)
    dataset = build_dataset(made)
    batch = dataset.collate([dataset[SampleKey(0, index)] for index in range(4)])
    on_gpu = prepare(batch, made.recipe, "cuda")
    for name, expected in prepare(batch, made.recipe, "cpu").items():
        torch.testing.assert_close(on_gpu[name].cpu(), expected)
