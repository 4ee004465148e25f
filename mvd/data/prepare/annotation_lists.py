"""Reads lists of videos: plain lists, and the annotation files of Kinetics, Something-Something and UCF101."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvd.config import ConfigError
from mvd.data.prepare.video_files import VIDEO_SUFFIXES
from mvd.data.text_files import numbered_lines, read_text

PATH_COLUMNS = ("path", "file", "filename", "file_name", "video", "video_path", "video_name", "video_id", "name", "id")
LABEL_COLUMNS = ("label", "class", "class_id", "class_name", "label_id", "target", "category", "action", "template")
FORMATS = "expected `path label` lines, Kinetics' .csv or .json, or Something-Something's .json"
_SUFFIXES = "|".join(re.escape(suffix) for suffix in VIDEO_SUFFIXES)
_PATH_WITH_SUFFIX = re.compile(rf"(.*(?:{_SUFFIXES}))(?:\s+(.+))?", re.IGNORECASE)
_FRAMES_AND_LABEL = re.compile(r"(\d+)\s+(-?\d+)")
_INTEGER = re.compile(r"[+-]?\d+(\.0+)?")


class Listed(NamedTuple):
    """A video of a list.

    names: file names without suffix that it may have, in order of preference; empty if `path` says where it is.
    label: name or number of its class; None if the list has no labels.
    """

    names: tuple[str, ...]
    label: str | None
    path: str | None = None

    @property
    def folder(self) -> str | None:
        """The first folder of a relative path, which is the class in lists such as UCF101's."""
        parts = Path(self.path or "").parts
        return parts[0] if len(parts) > 1 and parts[0] != "/" else None


def read_list(file: Path) -> list[Listed]:
    """Reads a list of videos; its format shows in its first line.

    - Kinetics-400, -600 and -700: .csv with the columns label, youtube_id, time_start and time_end, or .json.
    - Something-Something: .json with id and template.
    - Plain lists: path and label, separated by a space, tab, comma or semicolon, with or without a header; a column of
      frame numbers between the two (mmaction) is ignored. Without any labels, the first folder is the class (UCF101).

    Raises:
        ConfigError: a file that is missing, empty, or has another format or encoding.
    """
    if not file.is_file():
        raise ConfigError(f"there is no list {file}; give the annotation file's path")
    if re.search(r"_test_split\d\.txt$", file.name):
        raise ConfigError(
            f"{file} is HMDB51's list of one class; give the folder of all its lists: --dataset hmdb51 --train "
            f"{file.parent}"
        )
    text = read_text(file)
    lines = numbered_lines(text)
    if not lines:
        raise ConfigError(f"{file} lists no videos; check that it is the annotation file")
    if re.match(r"\s*(\{|\[\s*[\[{\"\]])", text) or file.suffix == ".json":
        listed = _read_json(text, file)
    elif "youtube_id" in _columns(_split_at(lines[0][1], _delimiter(lines[0][1]))):
        listed = _read_kinetics(lines, file)
    else:
        listed = _read_plain(lines, file)
    if not listed:
        raise ConfigError(f"{file} lists no videos; check that it is the annotation file")
    return listed


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ","


def _columns(fields: Sequence[str]) -> list[str]:
    return [field.strip(" \"'#").lower() for field in fields]


def _read_json(text: str, file: Path) -> list[Listed]:
    try:
        items = json.loads(text)
        if isinstance(items, dict):
            return [_kinetics_item(name, item) for name, item in items.items()]
        return [_something_item(item) for item in items]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{file} is neither Something-Something's .json (objects with id and template) nor Kinetics' (annotations "
            f"with label and segment): {type(error).__name__}: {error}; lists without classes, such as a test "
            "server's, cannot be used"
        ) from error


def _something_item(item: dict[str, Any]) -> Listed:
    return Listed((str(item["id"]),), item["template"].replace("[", "").replace("]", ""))


def _kinetics_item(name: str, item: dict[str, Any]) -> Listed:
    start, end = item["annotations"]["segment"]
    return _kinetics(name, int(start), int(end), item["annotations"]["label"])


def _kinetics(name: str, start: int, end: int, label: str) -> Listed:
    return Listed((f"{name}_{start:06d}_{end:06d}", name), label.strip())


def _read_kinetics(lines: Sequence[tuple[int, str]], file: Path) -> list[Listed]:
    delimiter = _delimiter(lines[0][1])
    rows = [_split_at(line, delimiter) for _, line in lines]
    columns = _columns(rows[0])
    if "label" not in columns:
        raise ConfigError(
            f"{file} has no label column (its columns are {', '.join(columns)}); lists without classes, such as a test "
            "server's, cannot be used: give the list with labels"
        )
    listed = []
    for (number, _), row in zip(lines[1:], rows[1:], strict=True):
        if len(row) < len(columns):
            raise ConfigError(f"{file}:{number}: expected {len(columns)} columns as in line 1, found {len(row)}")
        values = dict(zip(columns, row, strict=False))
        start, end = (_seconds(values, column, f"{file}:{number}") for column in ("time_start", "time_end"))
        label = _label(values["label"], f"{file}:{number}")
        listed.append(_kinetics(values["youtube_id"], start, end, label))
    return listed


def _seconds(values: dict[str, str], column: str, where: str) -> int:
    try:
        return int(float(values.get(column) or 0))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {column} must be a number of seconds, got {values[column]!r}") from error


def _read_plain(lines: Sequence[tuple[int, str]], file: Path) -> list[Listed]:
    rows = split_lines([line for _, line in lines])
    numbers = [number for number, _ in lines]
    header = rows[0]
    path_column, label_column, has_header = _find_columns(header, file)
    if has_header:
        rows, numbers = rows[1:], numbers[1:]
    elif all(len(row) == 1 for row in rows):
        return [_without_label(row[0], f"{file}:{number}") for number, row in zip(numbers, rows, strict=True)]
    listed = []
    for number, row in zip(numbers, rows, strict=True):
        where = f"{file}:{number}"
        if len(row) < 2 or len(row) <= max(path_column, label_column):
            raise ConfigError(f"{where}: {row[0]!r} has no label; write `path label`")
        if has_header and any(row[len(header) :]):
            raise ConfigError(
                f"{where}: expected {len(header)} columns as in the header, found {len(row)} ({', '.join(row)}); put "
                "paths with a separator between double quotes"
            )
        if not has_header and (len(row) > 3 or (len(row) == 3 and not row[1].isdecimal())):
            raise ConfigError(f"{where}: found {len(row)} columns ({', '.join(row)}); {FORMATS}")
        listed.append(_with_label(row[path_column], _label(row[label_column], where)))
    _check_kind(listed, numbers, file)
    return listed


def _find_columns(first: Sequence[str], file: Path) -> tuple[int, int, bool]:
    """The columns of the path and the label, and whether the first row is a header."""
    columns = _columns(first)
    paths = [columns.index(name) for name in PATH_COLUMNS if name in columns]
    labels = [columns.index(name) for name in LABEL_COLUMNS if name in columns]
    if not paths:
        return 0, -1, False
    if not labels:
        raise ConfigError(
            f"{file}: the header has no label column (its columns are {', '.join(columns)}); name it label"
        )
    return paths[0], labels[0], True


def split_lines(lines: Sequence[str]) -> list[list[str]]:
    """Splits lines into columns at the delimiter for which most lines have a video's path and a number as label."""

    def score(rows: list[list[str]]) -> int:
        several = (row for row in rows if len(row) > 1)
        return sum(1 + row[0].lower().endswith(VIDEO_SUFFIXES) + bool(_INTEGER.fullmatch(row[-1])) for row in several)

    readings = [[_split_at(line, delimiter) for line in lines] for delimiter in ("\t", ",", ";")]
    return max([*readings, _split_at_spaces(lines)], key=score)


def _split_at(line: str, delimiter: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:
        return [line]


def _split_at_spaces(lines: Sequence[str]) -> list[list[str]]:
    """A path may contain spaces: it ends at its suffix or, without one, before the last word."""
    rows = []
    for line in lines:
        match = _PATH_WITH_SUFFIX.fullmatch(line.replace('"', ""))
        path, rest = match.groups() if match else (line, None)
        if not match:
            rows.append(re.split(r"\s+(?=\S+$)", line))
        elif rest and (counted := _FRAMES_AND_LABEL.fullmatch(rest)):
            rows.append([path, *counted.groups()])
        else:
            rows.append([path, rest] if rest else [path])
    frames = [re.fullmatch(r"(.*\S)\s+(\d+)", row[0]) for row in rows]  # of folders with frames, which have no suffix
    if all(len(row) == 2 and match for row, match in zip(rows, frames, strict=True)):
        rows = [[*match.groups(), row[1]] for row, match in zip(rows, frames, strict=True) if match]
    return rows


def _without_label(path: str, where: str) -> Listed:
    listed = _with_label(path, None)
    if listed.folder is None:
        raise ConfigError(f"{where}: {path!r} has no label; write `path label`")
    return listed


def _with_label(path: str, label: str | None) -> Listed:
    names = () if path.lower().endswith(VIDEO_SUFFIXES) else (Path(path).name,)
    return Listed(names, label, path)


def _label(text: str, where: str) -> str:
    if not text:
        raise ConfigError(
            f"{where}: the label is empty; lists without classes, such as a test server's, cannot be used"
        )
    if not _INTEGER.fullmatch(text):
        return text
    number = int(float(text))
    if number < 0:
        raise ConfigError(
            f"{where}: the label must be a class index from 0 or a class name, got {text}; lists without classes, such "
            "as a test server's, cannot be used"
        )
    return str(number)


def _check_kind(listed: Sequence[Listed], numbers: Sequence[int], file: Path) -> None:
    """Refuses labels of which some are numbers and some are names."""
    places: dict[bool, tuple[int, str]] = {}
    for number, item in zip(numbers, listed, strict=True):
        places.setdefault((item.label or "").isdecimal(), (number, item.label or ""))
    if len(places) == 2:
        (name_line, name), (number_line, index) = places[False], places[True]
        hint = "delete line 1 if it is a header" if name_line == 1 else "use one of the two"
        raise ConfigError(
            f"{file}: labels must be all numbers or all class names, got {name!r} on line {name_line} and {index} on "
            f"line {number_line}; {hint}"
        )
