"""Which videos a data set consists of, from lists and from class folders."""

import os
from collections import Counter
from pathlib import Path

import pytest

from mvd.config import ConfigError
from mvd.data.prepare.annotation_lists import Listed
from mvd.data.prepare.find_videos import find_class_folders, find_listed, split_of
from mvd.data.prepare.video_files import scan


@pytest.fixture
def make(tmp_path):
    """Makes empty files below a folder, which it returns."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "videos"

    return make


def class_folders(folder: Path, share: float = 0.0, dataset: str | None = None):
    videos, left_out = scan(folder, folder.parent / "output")
    found, numbering, loose = find_class_folders(folder, videos, share, dataset)
    return found, numbering.names, left_out + loose


def test_kinetics_names_with_and_without_times(make):
    folder = make("train_256/abseiling/Zz12_000000_000010.mp4", "other/aB-_x.mkv", "val_256/Zz12_000000_000010.mp4")
    items = [Listed(("aB-_x_000005_000015", "aB-_x"), "b"), Listed(("Zz12_000000_000010", "Zz12"), "a")]
    videos = scan(folder, folder.parent / "output").videos
    found = list(find_listed(folder, videos, {"train": items, "val": items[1:]}, {"a": 0, "b": 1}))
    assert [(item.split, item.path.relative_to(folder).as_posix(), item.label) for item in found] == [
        ("train", "other/aB-_x.mkv", 1),
        ("train", "train_256/abseiling/Zz12_000000_000010.mp4", 0),
        ("val", "val_256/Zz12_000000_000010.mp4", 0),
    ]


def test_listed_paths_and_paths_without_a_suffix(make):
    folder = make("a/1.webm", "b/2.mp4")
    items = [Listed((), "0", "a/1.webm"), Listed(("2",), "1", "frames/2"), Listed((), "1", "b/3.mp4")]
    found = list(find_listed(folder, scan(folder, folder / "out").videos, {"val": items}, {"0": 0, "1": 1}))
    assert [(item.path, item.name, item.label, item.reason) for item in found] == [
        (folder / "a/1.webm", "a/1.webm", 0, ""),
        (folder / "b/2.mp4", "frames/2", 1, ""),
        (None, "b/3.mp4", 1, "no such file"),
    ]


def test_class_folders_hold_out_the_same_share_each_time(make):
    folder = make(*(f"{('cat', 'dog')[number % 2]}/{number}.mp4" for number in range(200)))
    (folder / "empty").mkdir()
    found, numbers, _ = class_folders(folder, 0.2)
    assert numbers == {"cat": 0, "dog": 1} and len(found) == 200
    held_out = [item.name for item in found if item.split == "val"]
    assert [sum(name.startswith(c) for name in held_out) for c in ("cat", "dog")] == [20, 20]
    make("cat/new.mp4")
    again = {item.name for item in class_folders(folder, 0.2)[0] if item.split == "val"}
    assert len(again & set(held_out)) >= 39


def test_a_large_share_leaves_something_to_train_on(make):
    found, _, _ = class_folders(make("a/1.mp4", "a/2.mp4", "a/3.mp4", "b/1.mp4"), 0.9)
    splits = [(item.label, item.split) for item in found]
    assert sorted(splits) == [(0, "train"), (0, "val"), (0, "val"), (1, "train")]


@pytest.mark.parametrize(
    "train, val", [("train", "val"), ("Train", "Val"), ("training", "validation"), ("train_256", "val_256")]
)
def test_split_folders_under_their_usual_names(make, train, val):
    found, numbers, _ = class_folders(
        make(f"{train}/b/1.mp4", f"{train}/b/4.mp4", f"{train}/a/x/2.mp4", f"{val}/b/3.mp4"), 0.5
    )
    assert numbers == {"a": 0, "b": 1}
    assert sorted((item.split, item.name, item.label) for item in found) == [
        ("train", f"{train}/a/x/2.mp4", 0),
        ("train", f"{train}/b/1.mp4", 1),
        ("train", f"{train}/b/4.mp4", 1),
        ("val", f"{val}/b/3.mp4", 1),
    ]


def test_validation_videos_are_held_out_of_train_if_there_is_only_test(make):
    names = [f"train/{c}/{number}.mp4" for c in "ab" for number in range(10)]
    found, _, _ = class_folders(make(*names, "test/a/t.mp4"), 0.1)
    assert [item.split for item in found].count("val") == 2
    assert [item.name for item in found if item.split == "test"] == ["test/a/t.mp4"]


def test_a_class_called_train_is_a_class(make):
    assert class_folders(make("train/1.mp4", "bus/2.mp4", "test/3.mp4"))[1] == {"bus": 0, "test": 1, "train": 2}
    assert split_of("train_the_dog") is None and split_of("validation-340x256") == "val"


def test_class_folders_of_a_known_data_set_have_its_indices(make):
    found, numbers, _ = class_folders(make("zumba/1.mp4", "air_drumming/2.mp4"), dataset="k400")
    assert [(item.name, item.label) for item in found] == [("air_drumming/2.mp4", 1), ("zumba/1.mp4", 399)]
    assert len(numbers) == 400


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "holds no videos; make one folder per class"),
        (["1.mp4", "2.mp4"], "holds 2 videos but no folder per class"),
        (["train/a/1.mp4", "val/a/1.mp4", "b/1.mp4"], r"folders of splits \(train, val\) beside others \(b\)"),
        (["train/a/1.mp4", "training/b/1.mp4"], "several folders for train: train, training; keep one"),
        (["Jump/1.mp4", "jump/2.mp4"], "the classes 'Jump' and 'jump' differ only in case"),
        (
            ["UCF-101/a/1.mp4", "UCF-101/b/2.mp4"],
            "a single class folder, UCF-101; give .*/UCF-101, which holds 2 folders",
        ),
        (["a/1.mp4"], "a single class folder, a; add another class"),
    ],
)
def test_folders_whose_meaning_is_not_clear_are_refused(names, message, make):
    folder = make("notes.txt", *names)
    with pytest.raises(ConfigError, match=message):
        class_folders(folder)


def test_what_is_left_out_is_counted(make, tmp_path):
    folder = make("a/1.MTS", "a/2.m2ts", "a/3.Mp4", "b/4.mp4", "a/5.gif", "a/6.txt", "b/7.txt", "loose.mp4", "README")
    make("__MACOSX/a/._1.MTS", "a/._1.MTS", "a/.DS_Store", "output/videos/a/1.mp4")
    (folder / "b" / "up").symlink_to(folder)
    videos, left_out = scan(folder, folder / "output")
    found, _, loose = find_class_folders(folder, videos, 0.0, None)
    assert [item.name for item in found] == ["a/1.MTS", "a/2.m2ts", "a/3.Mp4", "b/4.mp4"]
    assert dict(left_out + loose) == {
        ".gif files": 1,
        ".txt files": 2,
        "files without a suffix": 1,
        "hidden and system files": 3,
        "links to a folder above": 1,
        "the folder OUTPUT": 1,
        "videos outside of class folders": 1,
    }


def test_linked_folders_are_followed(make, tmp_path):
    folder = make("a/1.mp4")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.mp4").touch()
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "itself").symlink_to(folder / "itself")
    assert [item.name for item in class_folders(folder)[0]] == ["a/1.mp4", "b/2.mp4"]


def test_files_that_no_list_can_hold_are_set_apart_with_the_reason(make, tmp_path):
    folder = make("a/1.mp4", "b/line\nbreak.mp4", "b/u\u2028.mp4")
    (folder / "b" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    Path(os.fsdecode(os.fsencode(folder / "b") + b"/caf\xe9.mp4")).touch()
    found, _, _ = class_folders(folder, 0.3)
    assert {item.name.encode("utf-8", "backslashreplace").decode(): item.reason for item in found} == {
        "a/1.mp4": "",
        "b/line\nbreak.mp4": "its path contains a line break; rename it",
        "b/u\u2028.mp4": "",
        "b/gone.mp4": "a link to a file that does not exist",
        r"b/caf\udce9.mp4": "its path is not valid UTF-8; rename it",
    }
    assert all((item.path is None) == bool(item.reason) for item in found)


def test_a_share_for_the_test_leaves_the_validation_videos_as_they_were(make):
    folder = make(*(f"{('cat', 'dog')[number % 2]}/{number}.mp4" for number in range(200)), "rare/1.mp4", "rare/2.mp4")
    videos = scan(folder, folder.parent / "output").videos
    without, both = (find_class_folders(folder, videos, 0.1, None, share)[0] for share in (0.0, 0.2))
    splits = {item.name: item.split for item in both}
    assert [splits[item.name] for item in without if item.split == "val"] == ["val"] * 21
    assert Counter(splits.values()) == {"train": 141, "val": 21, "test": 40}
    assert {splits["rare/1.mp4"], splits["rare/2.mp4"]} == {"train", "val"}


def test_a_folder_of_test_videos_and_a_share_contradict_each_other(make):
    folder = make("train/cat/1.mp4", "train/dog/1.mp4", "test/cat/2.mp4", "test/dog/2.mp4")
    with pytest.raises(ConfigError, match="has a folder of test videos already; leave --test-share out"):
        find_class_folders(folder, scan(folder, folder.parent / "output").videos, 0.1, None, 0.2)
