import re

import numpy as np
import pytest
from PIL import Image

from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.data.annotations import load_annotations, load_image_folder


def written(folder, text: str) -> DatasetPaths:
    (folder / "train.csv").write_text(text)
    return DatasetPaths(root=str(folder))


def test_relative_absolute_and_spaced_paths(tmp_path):
    paths = written(tmp_path, "a/b.mp4 3\n/data/c.mp4 0\nwith a space.mp4 7\n")
    entries = load_annotations(paths, "train", 8)
    assert entries == [
        (str(tmp_path / "a/b.mp4"), 3),
        ("/data/c.mp4", 0),
        (str(tmp_path / "with a space.mp4"), 7),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_line_ends_and_tabs(tmp_path, encoding):
    (tmp_path / "train.csv").write_bytes("é.mp4 0\r\nu\u2028 x.mp4\t1\r\n".encode(encoding))
    entries = load_annotations(DatasetPaths(root=str(tmp_path)), "train", 2)
    assert entries == [(str(tmp_path / "é.mp4"), 0), (str(tmp_path / "u\u2028 x.mp4"), 1)]


def test_another_encoding_is_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes("a.mp4 0\ncafé.mp4 1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="train.csv:2: byte 0xe9 is not valid UTF-8; convert the file"):
        load_annotations(DatasetPaths(root=str(tmp_path)), "train", 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "train.csv lists no videos"),
        ("a.mp4 0\nb.mp4 8\n", "train.csv:2: the label must be an integer from 0 to 7, got '8'"),
        ("path label\na.mp4 0\n", "train.csv:1: .*got 'label'. Lists in other formats .* mvd.data.prepare"),
        ("a.mp4,0\n", "train.csv:1: 'a.mp4,0' has no label; .* mvd.data.prepare"),
        ("a\0.mp4 0\n", "train.csv:1: holds a zero byte"),
        ("a.mp4 -1\n", "train.csv:1: the label must be .*got '-1'"),
        ("a.mp4 1.5\n", "train.csv:1: the label must be .*got '1.5'"),
        ("a.mp4 0\n\nb.mp4\n", "train.csv:3: 'b.mp4' has no label"),
        ("a.mp4 0\nb.mp4 1\na.mp4 1\n", "train.csv:3: .*a.mp4 is already on line 1"),
        ("a.mp4 0\nb/../a.mp4 0\n", "train.csv:2: .*a.mp4 is already on line 1"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_annotations(written(tmp_path, text), "train", 8)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'val.csv'} does not exist")):
        load_annotations(DatasetPaths(root=str(tmp_path)), "val", 8)


def test_image_folders(tmp_path):
    for name in ("n02", "n01"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "train" / name / "x.JPEG")
    paths = DatasetPaths(root=str(tmp_path))
    assert load_image_folder(paths, "train", 2) == [
        (str(tmp_path / "train/n01/x.JPEG"), 0),
        (str(tmp_path / "train/n02/x.JPEG"), 1),
    ]
    with pytest.raises(ConfigError, match="must hold 1000 class folders, found 2"):
        load_image_folder(paths, "train", 1000)
    with pytest.raises(ConfigError, match="val is not a folder of class folders"):
        load_image_folder(paths, "val", 2)
    (tmp_path / "train" / "n03").mkdir()
    with pytest.raises(ConfigError, match="n03"):
        load_image_folder(paths, "train", 3)
