"""Test views of a list of videos, some of them broken."""

import numpy as np
import pytest
import torch

from mvd.config import ConfigError
from mvd.config.sizes import SIZES
from mvd.data import views as views_module
from mvd.data.annotations import Entry
from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.reader import open_video
from mvd.data.views import ViewDataset, Views, decode_views, view_loader
from tests.official import golden

TINY = Views("dense", clips=2, crops=3, stride=1, clip=SIZES["tiny"].clip)


class Counting:
    """A video of numbered frames that counts how often it is decoded."""

    def __init__(self, length: int, height: int, width: int) -> None:
        self.length, self.height, self.width = length, height, width
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return self.length

    def pictures(self, indices):
        self.decoded += indices.tolist()
        frames = np.zeros((len(indices), self.height, self.width, 3), np.uint8)
        frames[..., 0] = np.asarray(indices)[:, None, None]
        frames[..., 1] = np.arange(self.width)
        frames[..., 2] = np.arange(self.height)[:, None]
        return list(frames)


@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_views_are_clip_major_and_each_frame_is_decoded_once(sampling):
    video = Counting(40, 48, 69)
    views = decode_views(video, TINY._replace(sampling=sampling)).cut()
    assert views.shape == (6, 3, 16, 48, 48) and views.dtype == torch.uint8
    assert len(video.decoded) == len(set(video.decoded))
    starts = views[:, 1, 0, 0, 0].tolist()
    assert starts == [0, 10, 21] * 2
    frames = views[:, 0, :, 0, 0]
    assert (frames[0] == frames[2]).all() and (frames[0] != frames[3]).any()


def official_corners() -> list:
    """Height, width and the three (top, left) of frames whose short side is 224: landscape, portrait and square."""
    crops = golden("temporal_spatial_sampling.json")["c_spatial_crops_resized_HxW"]
    sizes = {name: tuple(int(side) for side in name.split("x")) for name in crops}
    return [
        pytest.param(*size, [(crop["top"], crop["left"]) for crop in crops[name]], id=name)
        for name, size in sizes.items()
        if min(size) == 224
    ]


@pytest.mark.parametrize("height, width, expected", official_corners())
def test_only_the_longer_side_is_cropped(height, width, expected):
    views = decode_views(Counting(8, height, width), Views("segment", clips=1)).cut()
    corners = [(int(view[2, 0, 0, 0]), int(view[1, 0, 0, 0])) for view in views]
    assert corners == expected and views.shape[-2:] == (224, 224)


def test_one_crop_is_the_middle_one():
    assert decode_views(Counting(24, 48, 64), TINY._replace(crops=1)).cut()[0, 1, 0, 0, 0] == 8


def test_an_unknown_sampling_is_refused():
    with pytest.raises(ConfigError, match='sampling must be "dense" or "segment"'):
        decode_views(Counting(24, 48, 64), TINY._replace(sampling="random"))


@pytest.fixture
def entries(motion_root, tmp_path) -> list[Entry]:
    (tmp_path / "broken.mp4").write_text("no video")
    good = [Entry(str(motion_root / "val" / f"{number:05d}.mp4"), number % 8) for number in range(5)]
    return [*good[:2], Entry(str(tmp_path / "broken.mp4"), 7), *good[2:]]


@pytest.mark.parametrize("world_size, videos, workers", [(1, 2, 0), (2, 1, 0), (4, 2, 1)])
def test_each_video_comes_once_and_broken_ones_are_flagged(entries, world_size, videos, workers):
    dataset = ViewDataset(entries, TINY)
    seen, unreadable = {}, {}
    for rank in range(world_size):
        for batch in view_loader(dataset, rank, world_size, videos, workers):
            unreadable |= batch["unreadable"]
            indices = batch["indices"].tolist()
            assert not set(indices) & set(seen)
            assert batch["labels"].tolist() == [entries[index].label for index in indices]
            seen |= dict(zip(indices, [views.cut() for views in batch["views"]], strict=True))
    assert sorted(seen) == [0, 1, 3, 4, 5] and list(unreadable) == [2] and unreadable[2]
    assert all(views.shape == (6, 3, 16, 48, 48) for views in seen.values())
    assert torch.equal(seen[3], decode_views(open_video(entries[3].path), TINY).cut())


@pytest.mark.parametrize("failures, flagged", [(1, []), (2, [3])])
def test_a_video_is_read_twice_before_it_is_flagged(entries, monkeypatch, failures, flagged):
    tries = []

    def fail_at_first(path: str, reader: str, index: None):
        tries.append(path)
        if tries.count(entries[3].path) <= failures and path == entries[3].path:
            raise UnreadableVideo(path, "the disk did not answer")
        return open_video(path, reader)

    monkeypatch.setattr(views_module, "open_video", fail_at_first)
    (batch,) = view_loader(ViewDataset(entries, TINY), rank=1, world_size=2, videos=3)
    assert list(batch["unreadable"]) == flagged and len(batch["views"]) == 3 - len(flagged)
