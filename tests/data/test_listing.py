"""Official annotation formats, plain lists and class folders."""

import json

import pytest

from mvd.config import ConfigError
from mvd.data.prepare.listing import class_numbers, find_class_folders, find_listed, read_list

KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"massaging person's head",aB-_x,5,15,train,0
abseiling,Zz12,0,10,train,1
"""
SOMETHING = [
    {"id": "78687", "label": "holding a potato", "template": "Holding [something] next to [something]"},
    {"id": "42326", "label": "a", "template": "Approaching [something] with your camera"},
]
LABELS = {"Approaching something with your camera": "0", "Holding something next to something": "1"}


@pytest.fixture
def folder(tmp_path):
    for name in ("train/abseiling/Zz12_000000_000010.mp4", "other/aB-_x.mkv", "val/Zz12_000000_000010.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    for name in ("videos/78687.webm", "videos/42326.mp4", "videos/notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def test_kinetics(folder):
    (folder / "train.csv").write_text(KINETICS)
    listed = read_list(folder / "train.csv")
    numbers = class_numbers(listed, None)
    assert numbers == {"abseiling": 0, "massaging person's head": 1}
    found = list(find_listed(folder / "videos", {"train": listed}, numbers))
    assert [(item.path.relative_to(folder / "videos").as_posix(), item.label) for item in found] == [
        ("other/aB-_x.mkv", 1),
        ("train/abseiling/Zz12_000000_000010.mp4", 0),
    ]
    (found, *_) = reversed(list(find_listed(folder / "videos", {"val": listed}, numbers)))
    assert found.path.parent.name == "val"


def test_something_something(folder):
    (folder / "train.json").write_text(json.dumps(SOMETHING))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    listed = read_list(folder / "train.json")
    numbers = class_numbers(listed, folder / "labels.json")
    found = list(find_listed(folder / "videos", {"train": listed}, numbers))
    assert [(item.path.name, item.label) for item in found] == [("78687.webm", 1), ("42326.mp4", 0)]


def test_plain_lists_with_numbers_or_names(folder):
    (folder / "a.csv").write_text("val/Zz12_000000_000010.mp4 7\nwith a space.mp4 3\n")
    listed = read_list(folder / "a.csv")
    found = list(find_listed(folder / "videos", {"train": listed}, class_numbers(listed, None)))
    assert [(item.path and item.path.name, item.name, item.label) for item in found] == [
        ("Zz12_000000_000010.mp4", "val/Zz12_000000_000010.mp4", 7),
        (None, "with a space.mp4", 3),
    ]
    (folder / "b.csv").write_text("x.mp4 zebra\ny.mp4 ant\n")
    assert class_numbers(read_list(folder / "b.csv"), None) == {"ant": 0, "zebra": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no videos"),
        ("a.mp4\n", "bad.csv:1: 'a.mp4' has no label"),
        ('[{"id": 3}]', "no Something-Something list .*need id and template"),
        ("[1, 2", "no Something-Something list"),
    ],
)
def test_a_bad_list_is_refused(text, message, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_list(tmp_path / "bad.csv")


def test_what_the_lists_need_is_named(folder):
    with pytest.raises(ConfigError, match="there is no list .*none.csv"):
        read_list(folder / "none.csv")
    (folder / "train.csv").write_text(KINETICS)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    with pytest.raises(ConfigError, match="has no class 'abseiling'"):
        class_numbers(read_list(folder / "train.csv"), folder / "labels.json")


def test_class_folders_hold_out_the_same_share_each_time(tmp_path):
    for number in range(200):
        path = tmp_path / ("cat", "dog")[number % 2] / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    found, numbers = find_class_folders(tmp_path, 0.2)
    assert numbers == {"cat": 0, "dog": 1} and len(found) == 200
    held_out = [item.name for item in found if item.split == "val"]
    assert [sum(name.startswith(c) for name in held_out) for c in ("cat", "dog")] == [20, 20]
    (tmp_path / "cat" / "new.mp4").touch()
    again = {item.name for item in find_class_folders(tmp_path, 0.2)[0] if item.split == "val"}
    assert len(again & set(held_out)) >= 39


def test_class_folders_below_split_folders(tmp_path):
    for name in ("train/b/1.mp4", "train/a/2.mp4", "val/b/3.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, numbers = find_class_folders(tmp_path, 0.5)
    assert [(item.split, item.name, item.label) for item in found] == [
        ("train", "train/a/2.mp4", 0),
        ("train", "train/b/1.mp4", 1),
        ("val", "val/b/3.mp4", 1),
    ]
    with pytest.raises(ConfigError, match="make one folder per class"):
        find_class_folders(tmp_path / "train" / "a", 0.5)
