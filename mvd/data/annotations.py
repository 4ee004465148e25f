"""Sample lists: `path label` files for videos, class folders for images; validated while they are read."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mvd.config import ConfigError, Recipe, dataset_of
from mvd.config.run_settings import DatasetPaths

MANIFEST = "manifest.json"  # written by mvd.data.prepare
Split = Literal["train", "val", "test"]


class Entry(NamedTuple):
    """One sample of a data set: an absolute path and a class index."""

    path: str
    label: int


def fingerprint(entries: Sequence[Entry]) -> str:
    """8 hex digits of a hash of the file names, labels and order; independent of the files' folder."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{Path(entry.path).name} {entry.label}\n".encode())
    return digest.hexdigest()[:8]


def class_count(numbers: Mapping[str, int]) -> int:
    """Number of classes of a class name -> index mapping: the largest index + 1."""
    return max(numbers.values()) + 1


def load_split(recipe: Recipe, paths: DatasetPaths, split: Split) -> list[Entry]:
    """The samples of a split of a recipe's data set.

    Raises:
        ConfigError: a list that contradicts the data set's record. For own data this includes the declared numbers of
            samples: they are part of the run directory's identity.
    """
    facts = dataset_of(recipe)
    load = load_annotations if facts.media == "video" else load_image_folder
    entries = load(paths, split, facts.classes)
    declared = {"train": facts.train_samples, "val": facts.val_samples}.get(split)
    if recipe.own_dataset is not None and declared not in (None, len(entries)):
        raise ConfigError(
            f"{Path(paths.root, getattr(paths, split))} lists {len(entries):,} samples, but the row declares "
            f"{split}_samples={declared} for {recipe.dataset}; set it to {len(entries)} if this is the right list"
        )
    return entries


def load_annotations(paths: DatasetPaths, split: Split, classes: int) -> list[Entry]:
    """Reads the annotation file of a split: one `path label` a line, relative paths being under the root.

    The last space of a line separates the two, so paths may contain spaces. The videos themselves are not looked
    at: on a network disk that takes hours.

    Raises:
        ConfigError: a missing or empty file, or a line without a label, with a bad one, or with a path seen before.
    """
    root = Path(paths.root).absolute()
    file = root / getattr(paths, split)
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the {split} list's place in the data set's paths")
    entries: list[Entry] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(_read(file).splitlines(), start=1):
        if not line.strip():
            continue
        entry = _parse(line, root, classes, f"{file}:{number}")
        place = os.path.normpath(entry.path)
        if place in first_seen:
            raise ConfigError(f"{file}:{number}: {entry.path} is already on line {first_seen[place]}; keep one")
        first_seen[place] = number
        entries.append(entry)
    if not entries:
        raise ConfigError(f"{file} lists no videos; write one `path label` a line")
    return entries


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _parse(line: str, root: Path, classes: int, where: str) -> Entry:
    path, separator, label = line.strip().rpartition(" ")
    if not separator:
        raise ConfigError(f"{where}: {line.strip()!r} has no label; write `path label`, separated by one space")
    if "\0" in path:
        raise ConfigError(f"{where}: the path {path!r} holds a zero byte; mend the line")
    if not (label.isascii() and label.isdigit() and int(label) < classes):
        raise ConfigError(f"{where}: the label {label!r} is not a whole number from 0 to {classes - 1}; mend the line")
    return Entry(os.path.join(root, path.strip()), int(label))


def load_image_folder(paths: DatasetPaths, split: Split, classes: int) -> list[Entry]:
    """Lists `root/<split>/<class folder>/<image>`; classes are numbered in the alphabetical order of their folders.

    Raises:
        ConfigError: no such folder, another number of classes than the data set has, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    folder = Path(paths.root).absolute() / split
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{folder} is not a folder of class folders ({reason}); mend the data set's root") from error
    if len(listing.classes) != classes:
        raise ConfigError(f"{folder} holds {len(listing.classes)} class folders where {classes} are due; complete it")
    return [Entry(path, label) for path, label in listing.samples]
