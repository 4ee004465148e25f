"""Which videos a data set consists of: those of its lists, or a folder of videos per class."""

import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mvd.config import ConfigError
from mvd.data.prepare.annotation_lists import Listed
from mvd.data.prepare.class_numbers import Numbering, known_classes, number_names
from mvd.data.prepare.video_files import MISSING, why_unusable

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Found(NamedTuple):
    """A video of the data set: its split, file, name in the list or folder, and class index.

    path: None if there is no usable file, and then `reason` says why.
    """

    split: str
    path: Path | None
    name: str
    label: int
    reason: str = ""


class Layout(NamedTuple):
    """How a folder of videos is laid out: split -> class -> videos, and the videos outside of class folders."""

    splits: dict[str, dict[str, list[Path]]]
    loose: int


def find_listed(
    folder: Path, videos: Sequence[Path], lists: Mapping[str, Sequence[Listed]], numbers: Mapping[str, int]
) -> Iterator[Found]:
    """Looks up each listed video; of several files with its name, one in a folder of its split is preferred."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for video in videos:
        by_name[video.stem].append(video)
    for split, listed in lists.items():
        for item in listed:
            label = numbers[item.label if item.label is not None else item.folder or ""]
            path = _look_up(folder, by_name, item, split)
            yield _usable(Found(split, path, item.path or item.names[0], label))


def _look_up(folder: Path, by_name: Mapping[str, list[Path]], item: Listed, split: str) -> Path | None:
    if item.path is not None and (not item.names or os.path.isfile(folder / item.path)):
        return folder / item.path
    candidates = [path for name in item.names for path in by_name.get(name, [])]
    candidates.sort(key=lambda path: split not in map(split_of, path.parts))
    return candidates[0] if candidates else None


def _usable(found: Found) -> Found:
    """The same without its path, but with the reason, if the file cannot be used."""
    reason = MISSING if found.path is None else why_unusable(found.path)
    return found if reason is None else found._replace(path=None, reason=reason)


def split_of(folder: str) -> str | None:
    """The split that a folder's name means: train, Training, train_256, val, Validation, test, ..."""
    return SPLIT_NAMES.get(re.sub(r"[_-]\d+(x\d+)?$", "", folder.lower()))


def find_class_folders(
    folder: Path, videos: Sequence[Path], val_share: float, dataset: str | None, test_share: float = 0.0
) -> tuple[list[Found], Numbering, Counter[str]]:
    """The videos of a folder per class, their classes, and what is left out.

    Class folders are in `folder` itself or in folders of its splits (train, val and test, under the names of
    `split_of`). Without a validation folder, a share of each class's training videos is held out for it; without a
    test folder, another share for testing, if that is asked for.

    Raises:
        ConfigError: no class folders, or folders whose meaning is not clear.
    """
    layout = read_layout(folder, videos)
    classes = sorted({name for split in layout.splits.values() for name in split})
    _check_classes(folder, classes, layout, dataset)
    if test_share and "test" in layout.splits:
        raise ConfigError(f"{folder} has a folder of test videos already; leave --test-share out")
    shares = {"val": 0.0 if "val" in layout.splits else val_share, "test": test_share}
    numbering = number_names(classes, known_classes(dataset), f"the data set {dataset}")
    found = []
    for split, by_class in layout.splits.items():
        for name, paths in by_class.items():
            names = {path.relative_to(folder).as_posix(): path for path in paths}
            held_out = _held_out(names, shares) if split == "train" else {}
            for shown, path in names.items():
                label = numbering.by_label[name]
                found.append(_usable(Found(held_out.get(shown, split), path, shown, label)))
    left_out = Counter({"videos outside of class folders": layout.loose} if layout.loose else {})
    return found, numbering, left_out


def read_layout(folder: Path, videos: Sequence[Path]) -> Layout:
    """Sorts videos into splits and classes by their folders.

    Raises:
        ConfigError: split folders beside class folders, or several folders for a split.
    """
    places = [(path.relative_to(folder).parts[:-1], path) for path in videos]
    depths: dict[str, int] = {}
    for parts, _ in places:
        if parts:
            depths[parts[0]] = min(len(parts), depths.get(parts[0], len(parts)))
    split_folders = {top: split for top, depth in depths.items() if depth > 1 and (split := split_of(top)) is not None}
    if "train" not in split_folders.values():
        split_folders = {}
    _check_split_folders(folder, split_folders, depths)
    splits: dict[str, dict[str, list[Path]]] = {}
    loose = 0
    for parts, path in places:
        split = split_folders.get(parts[0]) if parts else None
        place = parts if split is None else parts[1:]
        if place:
            splits.setdefault(split or "train", {}).setdefault(place[0], []).append(path)
        else:
            loose += 1
    return Layout(splits, loose)


def _check_split_folders(folder: Path, split_folders: Mapping[str, str], depths: Iterable[str]) -> None:
    others = sorted(set(depths) - split_folders.keys())
    if split_folders and others:
        raise ConfigError(
            f"{folder} holds folders of splits ({', '.join(split_folders)}) beside others ({', '.join(others[:3])}); "
            "move the others away, or give lists with --train and --val"
        )
    for split in set(split_folders.values()):
        same = [top for top, meant in split_folders.items() if meant == split]
        if len(same) > 1:
            raise ConfigError(f"{folder} holds several folders for {split}: {', '.join(same)}; keep one of them")


def _check_classes(folder: Path, classes: Sequence[str], layout: Layout, dataset: str | None) -> None:
    if not classes:
        found = f"{layout.loose} videos but no folder per class" if layout.loose else "no videos"
        raise ConfigError(f"{folder} holds {found}; make one folder per class, or give --train LIST")
    if len(classes) == 1 and dataset is None:
        below = {path.relative_to(folder).parts[1] for path in next(iter(layout.splits.values()))[classes[0]]}
        inside = folder / classes[0]
        hint = f"give {inside}, which holds {len(below)} folders or files" if len(below) > 1 else "add another class"
        raise ConfigError(f"{folder} holds a single class folder, {classes[0]}; {hint}")


def _held_out(names: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    """Name -> split of the videos of a class that are held out; at least one stays for training.

    shares: split -> share, of which each split gets at least one video if there are enough. The first split gets the
    names with the lowest checksums, whatever the other's share.
    """
    ordered = sorted(names, key=lambda name: zlib.crc32(os.fsencode(name)))
    held_out: dict[str, str] = {}
    for split, share in shares.items():
        left = len(ordered) - len(held_out) - 1
        count = min(max(round(share * len(ordered)), 1), left) if share > 0 else 0
        held_out |= dict.fromkeys(ordered[len(held_out) :][:count], split)
    return held_out
