"""Class indices: a known data set's own, those of a labels file, the list's numbers, or alphabetical order."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mvd.config import DATASETS, ConfigError
from mvd.config.typed import nearest
from mvd.data.prepare.annotation_lists import Listed
from mvd.data.text_files import numbered_lines, read_text

CLASSES = Path(__file__).parent / "classes"  # the public data sets' own class names, in the order of their indices
COUNTS_FROM_ONE = "ucf101"  # in its own lists


class Numbering(NamedTuple):
    """names: class name -> index, for the manifest. by_label: label in a list -> index. note: what a person is told."""

    names: dict[str, int]
    by_label: dict[str, int]
    note: str = ""


class LabelsFile(NamedTuple):
    """names: class name -> index from 0. first: the number of the first class in the file itself, 0 or 1."""

    names: dict[str, int]
    first: int = 0


def known_classes(dataset: str | None) -> dict[str, int] | None:
    """The data set's own class names and indices; None if they are not in `classes/`."""
    if dataset is None:
        return None
    file = CLASSES / f"{base_of(dataset)}.txt"
    if not file.is_file():
        return None
    names = numbered_lines(read_text(file))
    return {name: index for index, (_, name) in enumerate(names)}


def base_of(dataset: str) -> str:
    """The name of a data set without `_split<number>`."""
    return re.sub(r"_split\d$", "", dataset)


def read_labels(file: Path) -> LabelsFile:
    """Reads a labels file: .json with name -> number (Something-Something's labels.json), or text with one class per
    line, either `number name` (UCF101's classInd.txt) or names in the order of their indices.

    Raises:
        ConfigError: neither of these.
    """
    if not file.is_file():
        raise ConfigError(f"there is no labels file {file}; give its path")
    text = read_text(file)
    try:
        if text.lstrip().startswith("{"):
            numbers = {name: int(number) for name, number in json.loads(text).items()}
        else:
            numbers = _numbers_of_lines([line for _, line in numbered_lines(text)])
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{file} cannot be read as class name -> number ({error}); write .json such as "
            '{"jump": 0, "run": 1}, or one `number name` per line'
        ) from error
    first = min(numbers.values(), default=0)
    if sorted(numbers.values()) != list(range(first, first + len(numbers))) or first not in (0, 1) or not numbers:
        raise ConfigError(f"{file}: the numbers of the {len(numbers)} classes must be 0, 1, 2, ... without gaps")
    return LabelsFile({name: number - first for name, number in numbers.items()}, first)


def _numbers_of_lines(lines: Sequence[str]) -> dict[str, int]:
    pairs = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
    if all(pairs):
        return {match[2]: int(match[1]) for match in pairs if match}
    return {name: index for index, name in enumerate(lines)}


def number_classes(lists: Iterable[Sequence[Listed]], labels: Path | None, dataset: str | None) -> Numbering:
    """The index of each label of some lists.

    Raises:
        ConfigError: a class that the data set or the labels file lacks, or numbers that do not start at 0.
    """
    items = [item for listed in lists for item in listed]
    known, source = known_classes(dataset), f"the data set {dataset}"
    first = int(dataset is not None and base_of(dataset) == COUNTS_FROM_ONE)
    if labels is not None:
        given = read_labels(labels)
        if known is not None:
            _check_same(given.names, known, labels, str(dataset))
        known, source, first = given.names, str(labels), given.first
    texts = {item.label for item in items if item.label is not None}
    if all(text.isdecimal() for text in texts) and texts:
        return _by_number(items, texts, known, first, source)
    names = texts | {item.folder or "" for item in items if item.label is None}
    return number_names(names, known, source)


def number_names(names: Iterable[str], known: Mapping[str, int] | None, source: str) -> Numbering:
    """Looks class names up in those that are known, or numbers them in alphabetical order.

    Raises:
        ConfigError: a name that is not known, or two names that differ only in case.
    """
    if known is None:
        spellings: dict[str, str] = {}
        for name in sorted(names):
            if (other := spellings.setdefault(name.casefold(), name)) != name:
                raise ConfigError(f"the classes {other!r} and {name!r} differ only in case; rename or merge them")
        numbers = {name: index for index, name in enumerate(sorted(spellings.values()))}
        return Numbering(numbers, numbers)
    by_form = {_form(name): index for name, index in known.items()}
    found: dict[str, int] = {}
    for name in sorted(names):
        if _form(name) not in by_form:
            raise ConfigError(f"{source} has no class {name!r}{nearest(name, known)}; check the list and the data set")
        found[name] = by_form[_form(name)]
    return Numbering(dict(known), found)


def _form(name: str) -> str:
    """A class name as it is compared: folders have _ for spaces, templates have brackets."""
    return " ".join(re.sub(r"[_\[\]\"]", " ", name).split()).casefold()


def _check_same(given: Mapping[str, int], known: Mapping[str, int], file: Path, dataset: str) -> None:
    forms = {_form(name): index for name, index in known.items()}
    for name, index in given.items():
        if forms.get(_form(name)) != index:
            raise ConfigError(
                f"{file} gives {name!r} the number {index}, but in {dataset} it is "
                f"{forms.get(_form(name), 'no class')}; leave --labels out, or check that the file belongs to {dataset}"
            )


def _by_number(
    items: Sequence[Listed], texts: Iterable[str], known: Mapping[str, int] | None, first: int, source: str
) -> Numbering:
    """Numbers stay numbers, apart from UCF101's, which start at 1."""
    numbers = {text: int(text) for text in texts}
    lowest, highest = min(numbers.values()), max(numbers.values())
    if known is not None:
        if lowest < first or highest >= len(known) + first:
            raise ConfigError(
                f"labels must be from {first} to {len(known) + first - 1} for {source}, got {lowest} to {highest}"
            )
        by_label = {text: number - first for text, number in numbers.items()}
        return Numbering(dict(known), by_label | _folders(items, by_label, known))
    folders = _folders(items, numbers, None)
    if sorted(numbers.values()) != list(range(1, len(numbers) + 1)) or len(numbers) == 1:
        return Numbering(folders or numbers, numbers | folders)
    if not folders:
        raise ConfigError(
            f"labels run from 1 to {highest}, but class indices start at 0; subtract 1, or give the classes with "
            "--labels FILE (UCF101's classInd.txt, or one `number name` per line)"
        )
    by_label = {text: number - 1 for text, number in numbers.items()}
    names = {name: number - 1 for name, number in folders.items()}
    return Numbering(names, by_label | names, f"labels run from 1 to {highest}, as UCF101's do: 1 becomes index 0")


def _folders(items: Sequence[Listed], numbers: Mapping[str, int], known: Mapping[str, int] | None) -> dict[str, int]:
    """Folder -> number, if each number belongs to one folder and each folder to one number; else nothing.

    Lists without labels are numbered with it; without such a folder they are refused.
    """
    pairs = {(item.folder, numbers[item.label]) for item in items if item.label is not None}
    folders = {folder: number for folder, number in pairs if folder is not None}
    one_to_one = len(folders) == len(pairs) == len({number for _, number in pairs})
    unlabelled = {item.folder or "" for item in items if item.label is None}
    if known is not None:
        return number_names(unlabelled, known, "the labels file").by_label if unlabelled else {}
    if unlabelled and not (one_to_one and unlabelled <= folders.keys()):
        unknown = min(unlabelled - folders.keys(), default=min(unlabelled))
        raise ConfigError(
            f"a list without labels has the folder {unknown!r}, whose number the other lists do not tell; give the "
            "classes with --labels FILE"
        )
    return folders if one_to_one else {}


def check_count(numbering: Numbering, dataset: str | None) -> None:
    """Raises ConfigError unless there are as many classes as the data set has, or at least two."""
    count = max(numbering.names.values()) + 1
    if dataset is not None and count != (known := DATASETS[dataset].classes):
        raise ConfigError(f"found {count} classes, but {dataset} has {known}; check the lists and --dataset")
    if count < 2:
        raise ConfigError(f"classes must be at least 2, found {next(iter(numbering.names))!r} only")
