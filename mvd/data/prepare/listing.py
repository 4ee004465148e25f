"""Which videos a data set consists of, from its official annotation files, a plain list, or a folder per class."""

import csv
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mvd.config import ConfigError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")


class Listed(NamedTuple):
    """A video that a list asks for: possible file names (without suffix) or one path, and its class's name."""

    names: tuple[str, ...]
    label: str
    path: str | None = None


class Found(NamedTuple):
    """A video to be checked: its split, its file (None where there is none), how the list calls it, its class."""

    split: str
    path: Path | None
    name: str
    label: int


def read_list(file: Path) -> list[Listed]:
    """Reads an annotation file; which of the three kinds it is shows in its first line.

    Kinetics' .csv: columns label, youtube_id, time_start, time_end; videos are called by the id, with the times or
    without. Something-Something's .json: objects with id and template; videos are called by the id. Else a plain
    list: `path label` a line.

    Raises:
        ConfigError: a file that is missing, empty or of no such kind.
    """
    if not file.is_file():
        raise ConfigError(f"there is no list {file}; give the annotation file's path")
    text = file.read_text(encoding="utf-8-sig").strip()
    first = text.partition("\n")[0]
    if text.startswith("["):
        listed = _something_something(text, file)
    elif "youtube_id" in first.split(","):
        listed = [_kinetics(row) for row in csv.DictReader(text.splitlines())]
    else:
        listed = [_plain(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not listed:
        raise ConfigError(f"{file} lists no videos; check that it is the annotation file")
    return listed


def _something_something(text: str, file: Path) -> list[Listed]:
    try:
        items = json.loads(text)
        return [Listed((str(item["id"]),), item["template"].replace("[", "").replace("]", "")) for item in items]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no Something-Something list ({type(error).__name__}: {error}); its objects need id and template"
        ) from error


def _kinetics(row: dict[str, str]) -> Listed:
    name = row["youtube_id"]
    start, end = (int(float(row.get(column) or 0)) for column in ("time_start", "time_end"))
    return Listed((f"{name}_{start:06d}_{end:06d}", name), row["label"].strip())


def _plain(line: str, where: str) -> Listed:
    path, separator, label = line.strip().rpartition(" ")
    if not separator:
        raise ConfigError(f"{where}: {line.strip()!r} has no label; write `path label`, separated by one space")
    return Listed((), label, path.strip())


def class_numbers(listed: Iterable[Listed], labels: Path | None) -> dict[str, int]:
    """Class name -> number: of the labels file (name -> number, as Something-Something's .json), else as the names
    are where all are whole numbers, else in alphabetical order, as Kinetics has them.

    Raises:
        ConfigError: a label that the labels file lacks.
    """
    names = {item.label for item in listed}
    if labels is not None:
        try:
            numbers = {name: int(number) for name, number in json.loads(labels.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{labels} cannot be read as class name -> number ({error}); mend the file") from error
        unknown = sorted(names - numbers.keys())
        if unknown:
            raise ConfigError(f"{labels} has no class {unknown[0]!r}; give the labels file of this data set")
        return numbers
    if all(name.isascii() and name.isdigit() for name in names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(sorted(names))}


def find_listed(folder: Path, lists: dict[str, list[Listed]], numbers: dict[str, int]) -> Iterator[Found]:
    """Looks up each listed video below the folder; of several files of one name, one in a folder of its split."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in video_files(folder):
        by_name[path.stem].append(path)
    for split, listed in lists.items():
        for item in listed:
            if item.path is not None:
                path = folder / item.path
                found = path if path.is_file() else None
            else:
                candidates = [path for name in item.names for path in by_name.get(name, [])]
                candidates.sort(key=lambda path: split not in path.parts)
                found = candidates[0] if candidates else None
            yield Found(split, found, item.path or item.names[0], numbers[item.label])


def find_class_folders(folder: Path, val_share: float) -> tuple[list[Found], dict[str, int]]:
    """Videos in a folder per class, and the classes' numbers: `folder/train/<class>/...` and `folder/val/<class>/...`
    where there are such, else `folder/<class>/...`, of which a share is held out for validation.

    Raises:
        ConfigError: no class folders.
    """
    split_folders = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    roots = {folder / split: split for split in split_folders} if "train" in split_folders else {folder: None}
    numbers = {name: number for number, name in enumerate(sorted({c.name for root in roots for c in _classes(root)}))}
    if not numbers:
        raise ConfigError(f"{folder} holds no folders with videos; make one folder per class, or give --train LIST")
    found = []
    for root, split in roots.items():
        for class_folder in _classes(root):
            names = {path.relative_to(folder).as_posix(): path for path in video_files(class_folder)}
            held_out = _held_out(names, val_share) if split is None else set()
            for name, path in names.items():
                found.append(
                    Found(split or ("val" if name in held_out else "train"), path, name, numbers[class_folder.name])
                )
    return found, numbers


def _held_out(names: Iterable[str], share: float) -> set[str]:
    """A share of a class's videos, one at least of several: those whose names have the lowest checksums."""
    ordered = sorted(names, key=lambda name: zlib.crc32(name.encode()))
    count = max(round(share * len(ordered)), 1) if share > 0 and len(ordered) > 1 else 0
    return set(ordered[:count])


def _classes(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and next(video_files(path), None) is not None)


def video_files(folder: Path) -> Iterator[Path]:
    """All files below the folder that are called as videos are, in order."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(VIDEO_SUFFIXES):
                yield Path(place, name)
