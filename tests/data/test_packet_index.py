"""The packet index that prepare writes: trusted only for the files that it was made of."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvd.data.annotations import Entry
from mvd.data.datasets import MaskedClipDataset, SampleKey, build_dataset
from mvd.data.prepare.index_packets import write_packet_index
from mvd.data.video.packet_index import PACKET_INDEX, PacketIndex
from mvd.data.video.packets import PacketVideo
from mvd.data.video.reader import open_video
from tests.data.indexing import write_index
from tests.data.stages import stage
from tests.data.torture import damaged, moving_picture, write

WANTED = np.array([3, 40, 7])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two indexed videos."""
    folder = tmp_path_factory.mktemp("indexed")
    paths = [write(folder / f"{seed}.mp4", moving_picture(60, 48, 64, seed), g="12") for seed in (0, 1)]
    write_index(paths, folder)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it that keeps the files' times."""
    return Path(shutil.copytree(made, tmp_path / "moved"))


def opened(folder: Path, name: str = "0.mp4"):
    index = PacketIndex.of_folder(str(folder))
    assert index is not None
    return index.open(str(folder / name))


def test_a_moved_folder_keeps_its_index(folder):
    video = opened(folder)
    assert video is not None
    np.testing.assert_array_equal(video.frames(WANTED), PacketVideo(str(folder / "0.mp4")).frames(WANTED))


def test_only_what_the_frames_need_is_read(folder, monkeypatch):
    read = []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda *what: read.append(what[1]) or original(*what))
    video = opened(folder)
    assert read == []
    video.frames(np.array([30]))
    assert 0 < sum(read) < (folder / "0.mp4").stat().st_size / 4


def replace_with_another_video(path: Path) -> None:
    shutil.copy(path.with_name("1.mp4"), path)


def write_anew(path: Path) -> None:
    """The size stays as it was: only the time tells."""
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("change", [replace_with_another_video, write_anew])
def test_a_changed_file_is_not_read_by_its_old_row(change, folder, caplog):
    change(folder / "0.mp4")
    index = PacketIndex.of_folder(str(folder))
    with caplog.at_level(logging.WARNING):
        assert index.open(str(folder / "0.mp4")) is None and index.open(str(folder / "0.mp4")) is None
    assert [record.getMessage().count("run mvd.data.prepare again") for record in caplog.records] == [1]
    frames = open_video(str(folder / "0.mp4"), index=index).frames(WANTED)
    np.testing.assert_array_equal(frames, PacketVideo(str(folder / "0.mp4")).frames(WANTED))


def test_a_row_that_is_wrong_after_all_is_not_trusted(folder):
    """The right size and time, but other packets: what whole-file reading gives counts."""
    with sqlite3.connect(folder / PACKET_INDEX) as connection:
        (packets,) = connection.execute("SELECT packets FROM videos WHERE path = '1.mp4'").fetchone()
        connection.execute("UPDATE videos SET packets = ? WHERE path = '0.mp4'", (packets,))
    video = opened(folder)
    np.testing.assert_array_equal(video.frames(WANTED), PacketVideo(str(folder / "0.mp4")).frames(WANTED))


def test_a_damaged_row_costs_time_only(folder, caplog):
    with sqlite3.connect(folder / PACKET_INDEX) as connection:
        connection.execute("UPDATE videos SET packets = x'00ff' WHERE path = '0.mp4'")
    with caplog.at_level(logging.WARNING):
        assert opened(folder) is None and opened(folder, "1.mp4") is not None
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a database\n" * 1000])
def test_a_damaged_index_costs_time_only(content, folder, caplog):
    (folder / PACKET_INDEX).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert opened(folder) is None
    assert "cannot be read" in caplog.text
    write_packet_index([str(folder / "0.mp4")], folder, workers=1)
    assert opened(folder) is not None and opened(folder, "1.mp4") is None


def test_files_that_are_damaged_or_gone_get_no_row(folder):
    broken = damaged("half_a_file", folder / "0.mp4", folder / "broken.mp4")
    index = write_index([broken, folder / "gone.mp4", folder / "1.mp4"], folder)
    assert index.open(str(broken)) is None and index.open(str(folder / "gone.mp4")) is None
    assert index.open(str(folder / "1.mp4")) is not None
    (folder / "1.mp4").unlink()
    assert index.open(str(folder / "1.mp4")) is None


def test_rows_of_unchanged_files_are_kept(folder, monkeypatch):
    before = (folder / PACKET_INDEX).read_bytes()
    monkeypatch.setattr("mvd.data.prepare.index_packets.index_video", lambda path, folder: pytest.fail(path))
    write_packet_index([str(folder / f"{number}.mp4") for number in (0, 1)], folder, workers=1)
    assert (folder / PACKET_INDEX).read_bytes() == before


def test_training_reads_a_prepared_data_set_with_its_index(class_folders, tmp_path):
    """`prepare` writes the index, a stage finds it, and its samples are those without it."""
    output = tmp_path / "prepared"
    command = [sys.executable, "-m", "mvd.data.prepare", str(class_folders), str(output), "--short-side", "48"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    videos = sorted(output.rglob("*.mp4"))
    made = stage(output, "pretrain")
    dataset = MaskedClipDataset(made.recipe, *_sizes(made), [Entry(str(path), 0) for path in videos], "pyav")
    plain = [dataset[SampleKey(0, number)]["video"] for number in range(4)]
    dataset.index = PacketIndex.of_folder(str(output))
    assert all(dataset.index.open(str(path)) is not None for path in videos) and len(videos) == 24
    for number, clip in enumerate(plain):
        assert (dataset[SampleKey(0, number)]["video"] == clip).all()


def _sizes(made):
    from mvd.config.sizes import SIZES

    return SIZES[made.recipe.student].clip, SIZES[made.recipe.teacher].image.image_size


def test_a_stage_finds_the_index_of_its_data_set(motion_root, tmp_path):
    root = Path(shutil.copytree(motion_root, tmp_path / "motion"))
    assert build_dataset(stage(root, "pretrain")).index is None
    entries = build_dataset(stage(root, "pretrain")).entries
    write_index([Path(entry.path) for entry in entries[:2]], root)
    dataset = build_dataset(stage(root, "pretrain"))
    assert dataset.index.open(dataset.entries[1].path) is not None and dataset.index.open(entries[2].path) is None
