"""Training samples: shapes, draws that depend on the key alone, and unreadable files."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from mvd.config import ConfigError
from mvd.config.sizes import SIZES
from mvd.data.annotations import Entry
from mvd.data.clip.crops import multi_scale_box
from mvd.data.clip.frame_sampling import dense_train_indices, pretrain_indices, segment_train_indices
from mvd.data.datasets import FinetuneDataset, ImageTeacherDataset, MaskedClipDataset, SampleKey, build_dataset
from mvd.data.rng import Purpose, epoch_order
from mvd.data.video import reader
from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.reader import open_video
from mvd.stage import Execution, Stage
from tests.data.stages import PLAIN, recipe, stage

KINDS = ["image_teacher", "video_teacher", "pretrain", "finetune"]
SHAPES = {
    "image_teacher": {"images": (1, 3, 48, 48), "mask": (1, 16)},
    "video_teacher": {"video": (1, 3, 16, 48, 48), "mask": (1, 128)},
    "pretrain": {"video": (1, 3, 16, 48, 48), "mask": (1, 128)},
    "finetune": {
        "video": (2, 3, 16, 48, 48),
        "labels": (2,),
        "erase": (2, 4),
        "noise_seeds": (2,),
        "mix_seeds": (2,),
    },
}


def same(one: dict, other: dict) -> bool:
    """Whether two samples are equal, but for the time that decoding took."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items()
        if name != "decode_ms"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(motion_root, kind):
    sample = build_dataset(stage(motion_root, kind))[SampleKey(0, 5)]
    assert sample.pop("unreadable") == [] and sample.pop("indices").tolist() == [5]
    assert sample["decode_ms"].item() > 0
    assert sample["layer_seeds"].shape == (2 if kind == "finetune" else 1,)
    del sample["decode_ms"], sample["layer_seeds"]
    assert {name: tuple(value.shape) for name, value in sample.items()} == SHAPES[kind]
    assert all(sample[name].dtype == torch.uint8 for name in ("images", "video") if name in sample)
    assert "mask" not in sample or sample["mask"].dtype == torch.bool


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_follows_from_its_key_and_the_seed_alone(motion_root, kind):
    dataset = build_dataset(stage(motion_root, kind))
    first = dataset[SampleKey(1, 7, 3)]
    for number in range(3):
        dataset[SampleKey(0, number)]
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    again = build_dataset(stage(motion_root, kind))
    assert same(first, again[SampleKey(1, 7, 3)])
    assert not same(first, again[SampleKey(2, 7, 3)])
    assert not same(first, build_dataset(stage(motion_root, kind, seed=1))[SampleKey(1, 7, 3)])


def test_each_copy_of_a_video_has_its_own_layer_seed(motion_root):
    dataset = build_dataset(stage(motion_root, "finetune"))
    seeds = [dataset[SampleKey(epoch, index)]["layer_seeds"] for epoch in range(2) for index in range(2)]
    assert len(set(torch.cat(seeds).tolist())) == 8


def test_the_image_video_comes_only_at_another_size(motion_root):
    sample = build_dataset(stage(motion_root, "pretrain", student="huge", teacher="huge"))[SampleKey(0, 0)]
    assert sample["video"].shape == (1, 3, 16, 224, 224) and sample["image_video"].shape == (1, 3, 16, 196, 196)
    smaller = torch.nn.functional.interpolate(sample["video"][0].float(), (196, 196), mode="bilinear")
    assert (smaller - sample["image_video"][0]).abs().mean() < 2  # the same crop


def test_pretraining_neither_flips_nor_recolours(motion_root):
    """Crops as high as the 48 pixel frames are not resized, so they must be windows of the decoded frames."""
    dataset = build_dataset(stage(motion_root, "video_teacher"))
    frames = open_video(dataset.entries[3].path).frames(np.arange(9))
    windows = {frame[:, left : left + 48].tobytes() for frame in frames for left in (0, 4, 8, 12, 16)}
    firsts = [dataset[SampleKey(epoch, 3)]["video"][0, :, 0].permute(1, 2, 0).numpy() for epoch in range(60)]
    assert sum(first.tobytes() in windows for first in firsts) >= 2  # one crop in ten is of that size
    assert not any(first[:, ::-1].tobytes() in windows for first in firsts)


def test_pretraining_crops_are_pillows(real_videos):
    """The same box at both input sizes, smoothed where it shrinks; a level or two may be rounded otherwise."""
    made, key = recipe("pretrain", stride=4), SampleKey(1, 0)
    dataset = MaskedClipDataset(made, SIZES["tiny"].clip, 36, [Entry(real_videos["bikes"], 0)], "decord")
    sample = dataset[key]
    video = open_video(real_videos["bikes"])
    frames = video.frames(pretrain_indices(len(video), dataset.draws(key, Purpose.FRAMES)))
    top, left, height, width = multi_scale_box(*frames.shape[1:3], 48, dataset.draws(key, Purpose.CROP))
    crop = frames[:, top : top + height, left : left + width]
    for name, size in (("video", 48), ("image_video", 36)):
        pillow = [Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR) for frame in crop]
        difference = sample[name][0].permute(1, 2, 3, 0).numpy().astype(int) - np.stack(pillow)
        assert np.abs(difference).max() <= 2 and np.abs(difference).mean() < 0.2


class Numbered:
    """A video of 300 frames, each of which shows its number in its first two channels."""

    def __init__(self, path: str) -> None:
        pass

    def __len__(self) -> int:
        return 300

    def pictures(self, indices: np.ndarray) -> list[np.ndarray]:
        frames = np.zeros((len(indices), 48, 64, 3), np.uint8)
        frames[..., 0], frames[..., 1] = (part[:, None, None] for part in np.divmod(indices, 256))
        return list(frames)


@pytest.mark.parametrize(
    ("kind", "fields", "sampler"),
    [
        ("video_teacher", {"stride": 4}, pretrain_indices),
        ("pretrain", {"stride": 4}, pretrain_indices),
        ("finetune", {"stride": 4, "sampling": "dense", "augmentation": PLAIN}, dense_train_indices),
        ("finetune", {"stride": 4, "sampling": "segment", "augmentation": PLAIN}, segment_train_indices),
    ],
)
def test_each_kind_samples_its_frames_in_its_own_way(motion_root, monkeypatch, kind, fields, sampler):
    made = stage(motion_root, kind, **fields)
    monkeypatch.setitem(reader.READERS, made.execution.reader, Numbered)
    dataset = build_dataset(made)
    for index in range(5):
        clip = dataset[SampleKey(0, index)]["video"][0, :, :, 24, 24].int()
        expected = sampler(300, dataset.draws(SampleKey(0, index), Purpose.FRAMES))
        assert (256 * clip[0] + clip[1]).tolist() == expected.tolist()


@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_the_copies_of_a_video_share_their_frames(motion_root, sampling):
    made = stage(motion_root, "finetune", sampling=sampling, augmentation=PLAIN)
    sample = build_dataset(made)[SampleKey(0, 9)]
    assert torch.equal(sample["video"][0], sample["video"][1])
    assert sample["labels"].tolist() == [1, 1] and sample["noise_seeds"][0] != sample["noise_seeds"][1]


def test_the_copies_of_a_video_are_augmented_differently(motion_root):
    sample = build_dataset(stage(motion_root, "finetune"))[SampleKey(0, 9)]
    assert not torch.equal(sample["video"][0], sample["video"][1])


def test_collated_copies_stay_side_by_side(motion_root):
    dataset = build_dataset(stage(motion_root, "finetune"))
    samples = [dataset[SampleKey(0, index, group)] for index, group in ((0, 0), (3, 0), (6, 1))]
    batch = dataset.collate(samples)
    assert batch["labels"].tolist() == [0, 0, 3, 3, 6, 6] and batch["indices"].tolist() == [0, 3, 6]
    assert torch.equal(batch["video"][3], samples[1]["video"][1])
    assert len(set(batch["mix_seeds"][:4].tolist())) == 1 and batch["mix_seeds"][4] != batch["mix_seeds"][3]


def test_images_of_folders(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    made = recipe("image_teacher", dataset="imagenet", flip=1.0)
    sample = ImageTeacherDataset(made, [Entry(str(tmp_path / "a.png"), 0)], "pyav")[SampleKey(0, 0)]
    assert sample["images"].shape == (1, 3, 48, 48) and sample["mask"].sum() == 12


@pytest.fixture
def damaged(motion_root, tmp_path) -> FinetuneDataset:
    """Six videos, of which numbers 2 and 3 are broken."""
    entries = [Entry(str(motion_root / "train" / f"{number:05d}.mp4"), number) for number in range(6)]
    for number in (2, 3):
        (tmp_path / f"{number}.mp4").write_text("no video")
        entries[number] = Entry(str(tmp_path / f"{number}.mp4"), number)
    return FinetuneDataset(recipe("finetune"), entries, "pyav")


def readable_after(index: int) -> tuple[int, list[int]]:
    """The first readable video that follows one of the damaged in the epoch's order, and the broken up to it."""
    order = epoch_order(0, 0, 6)
    following = [order[(order.index(index) + shift) % 6] for shift in range(6)]
    broken = list(itertools.takewhile(lambda one: one in (2, 3), following))
    return following[len(broken)], broken


@pytest.mark.parametrize("index", [2, 3])
def test_an_unreadable_video_is_replaced_by_the_next_of_the_epochs_order_and_named(damaged, index):
    expected, broken = readable_after(index)
    sample = damaged[SampleKey(0, index)]
    assert sample["unreadable"] == [damaged.entries[one].path for one in broken]
    assert sample["indices"].tolist() == [expected] and sample["labels"].tolist() == [expected] * 2
    assert same(sample, damaged[SampleKey(0, index)])
    batch = damaged.collate([damaged[SampleKey(0, 1)], sample])
    assert batch["unreadable"] == sample["unreadable"] and batch["indices"].tolist() == [1, expected]
    assert (sample["layer_seeds"] != damaged[SampleKey(0, expected)]["layer_seeds"]).all()


def test_a_passing_fault_is_not_a_replacement(damaged, monkeypatch):
    opened = []

    def fails_once(path: str):
        opened.append(path)
        if len(opened) == 1:
            raise UnreadableVideo(path, "the disk was away")
        return reader.PacketVideo(path)

    monkeypatch.setitem(reader.READERS, "pyav", fails_once)
    sample = damaged[SampleKey(0, 0)]
    assert sample["unreadable"] == [] and sample["indices"].tolist() == [0]


def test_a_data_set_of_broken_files_is_given_up(tmp_path):
    entries = [Entry(str(tmp_path / f"{number}.mp4"), 0) for number in range(20)]
    dataset = FinetuneDataset(recipe("finetune"), entries, "pyav")
    sample = dataset[SampleKey(0, 0)]
    assert sample["failed"].startswith("11 consecutive files cannot be read, the last one: ")
    assert dataset.collate([sample]) == sample


def test_a_stage_without_a_path_is_refused():
    with pytest.raises(ConfigError, match="no path for data set motion; set datasets.motion.root"):
        build_dataset(Stage(kind="finetune", id="finetune-x", recipe=recipe("finetune"), execution=Execution()))
