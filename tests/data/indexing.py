"""Compares reading with a packet index to reading without."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvd.data.prepare.index_packets import _write, index_video
from mvd.data.video.packet_index import PACKET_INDEX, PacketIndex
from mvd.data.video.packets import PacketVideo


def write_index(paths: Sequence[Path], folder: Path) -> PacketIndex:
    """As write_packet_index, in this process."""
    rows = [index_video(str(path), folder) for path in paths]
    _write([row for row in rows if row is not None], folder / PACKET_INDEX)
    index = PacketIndex.of_folder(str(folder))
    assert index is not None
    return index


def assert_same_with_index(paths: Sequence[Path], folder: Path) -> list[Path]:
    """All frames, and frames in any order, are the same; returns the files that the index has."""
    index = write_index(paths, folder)
    indexed = []
    rng = np.random.default_rng(0)
    for path in paths:
        video, plain = index.open(str(path)), PacketVideo(str(path))
        if video is None:
            continue
        assert len(video) == len(plain), path
        expected = plain.frames(np.arange(len(plain)))
        np.testing.assert_array_equal(video.frames(np.arange(len(video))), expected, err_msg=str(path))
        for count in (1, 1, 2, 5):
            wanted = rng.integers(len(video), size=count)
            np.testing.assert_array_equal(index.open(str(path)).frames(wanted), expected[wanted], err_msg=str(path))
        indexed.append(path)
    return indexed
