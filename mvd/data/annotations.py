"""Sample lists: `path label` files for videos, class folders for images; validated while they are read."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mvd.config import ConfigError, Recipe, dataset_of
from mvd.config.run_settings import DatasetPaths
from mvd.data.text_files import numbered_lines, read_text

MANIFEST = "manifest.json"  # written by mvd.data.prepare
Split = Literal["train", "val", "test"]
LINE = re.compile(r"(.*\S)[ \t]+(\S+)")
OTHER_FORMATS = "Lists in other formats (headers, commas, class names) become such lists with mvd.data.prepare"


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
    """Read the list of a split: one `path label` per line; relative paths are under the root.

    The last space or tab of a line separates the two, so paths may contain spaces. The videos themselves are not
    opened: on a network disk that would take hours.

    Raises:
        ConfigError: a missing or empty file, or a line without a label, with an invalid one, or with a repeated path.
    """
    root = Path(paths.root).absolute()
    file = root / getattr(paths, split)
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist; set datasets.NAME.{split} to the {split} list in the cluster profile"
        )
    entries: list[Entry] = []
    first_seen: dict[str, int] = {}
    for number, line in numbered_lines(read_text(file)):
        entry = _parse(line, root, classes, f"{file}:{number}")
        place = os.path.normpath(entry.path)
        if place in first_seen:
            raise ConfigError(f"{file}:{number}: {entry.path} is already on line {first_seen[place]}; remove one")
        first_seen[place] = number
        entries.append(entry)
    if not entries:
        raise ConfigError(f"{file} lists no videos; write one `path label` per line")
    return entries


def _parse(line: str, root: Path, classes: int, where: str) -> Entry:
    match = LINE.fullmatch(line)
    if match is None:
        raise ConfigError(f"{where}: {line!r} has no label; write `path label`, separated by a space. {OTHER_FORMATS}")
    path, label = match.groups()
    if not (label.isascii() and label.isdigit() and int(label) < classes):
        raise ConfigError(
            f"{where}: the label must be an integer from 0 to {classes - 1}, got {label!r}. {OTHER_FORMATS}"
        )
    return Entry(os.path.join(root, path), int(label))


def load_image_folder(paths: DatasetPaths, split: Split, classes: int) -> list[Entry]:
    """List `root/<split>/<class folder>/<image>`; class indices follow the alphabetical order of the class folders.

    Raises:
        ConfigError: no such folder, another number of classes than the data set has, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    folder = Path(paths.root).absolute() / split
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{folder} is not a folder of class folders ({reason}); check the data set's root") from error
    if len(listing.classes) != classes:
        raise ConfigError(f"{folder} must hold {classes} class folders, found {len(listing.classes)}")
    return [Entry(path, label) for path, label in listing.samples]
