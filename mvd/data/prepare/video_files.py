"""Finds the video files below a folder, and counts what is left out."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mvd.config import ConfigError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".webm", ".mkv", ".avi", ".divx", ".wmv", ".asf", ".flv"),
    *(".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".ogv", ".mxf", ".dv"),
)
MISSING = "no such file"
SYSTEM = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found")


class Scan(NamedTuple):
    """The video files, in order of their paths, and how many other files of each kind there are."""

    videos: list[Path]
    left_out: Counter[str]


def scan(folder: Path, output: Path) -> Scan:
    """Looks for video files at any depth, following links; leaves out the output folder.

    Raises:
        ConfigError: a folder that cannot be read.
    """
    left_out: Counter[str] = Counter()
    return Scan(list(_walk(folder, output, frozenset(), left_out)), left_out)


def _walk(place: Path, output: Path, ancestors: frozenset[tuple[int, int]], left_out: Counter[str]) -> Iterator[Path]:
    try:
        status = place.stat()
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        left_out["links to a folder above"] += 1
        return
    if output.exists() and output.samefile(place):
        left_out["the folder OUTPUT"] += 1
        return
    folders, files = _sorted_out(entries, left_out)
    for name in files:
        if name.lower().endswith(VIDEO_SUFFIXES):
            yield place / name
        else:
            suffix = os.path.splitext(name)[1].lower()
            left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1
    for name in folders:
        yield from _walk(place / name, output, ancestors | {identity}, left_out)


def _sorted_out(entries: list["os.DirEntry[str]"], left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """The names of folders and files, without hidden ones and those of operating systems."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            left_out["hidden and system files"] += 1
        else:
            names[_is_folder(entry)].append(entry.name)
    return names[True], names[False]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def why_unusable(path: Path) -> str | None:
    """Why a file cannot be in a list, which is UTF-8 text with one path per line; None if it can."""
    if not os.path.exists(path) or os.path.isdir(path):
        return "a link to a file that does not exist" if os.path.islink(path) else MISSING
    if "\n" in str(path) or "\r" in str(path):
        return "its path contains a line break; rename it"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its path is not valid UTF-8; rename it"
    return None
