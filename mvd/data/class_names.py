"""The class names of a recipe's data set. Must not import torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from mvd.config import DatasetPaths, Recipe, dataset_of
from mvd.data.annotations import MANIFEST
from mvd.data.prepare.class_numbers import known_classes


def class_names_of(recipe: Recipe, paths: DatasetPaths | None) -> list[str] | None:
    """The names, index = class number: those of the manifest that mvd.data.prepare wrote, or else the data set's own.

    None if neither has one name for each class, or if the manifest only has numbers, as of lists with class numbers.
    """
    classes = dataset_of(recipe).classes
    for names in (_of_manifest(paths), names_of_dataset(recipe.dataset)):
        if names is not None and len(names) == classes:
            return names
    return None


def names_of_dataset(dataset: str) -> list[str] | None:
    """The class names of a known data set; None for others and for those whose names come with their lists."""
    if dataset == "motion":
        from mvd.data.synthetic_motion import CLASSES  # imports PyAV and OpenCV

        return list(CLASSES)
    known = known_classes(dataset)
    return None if known is None else list(known)


def _of_manifest(paths: DatasetPaths | None) -> list[str] | None:
    file = None if paths is None else Path(paths.root) / MANIFEST
    if file is None or not file.is_file():
        return None
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))["classes"]
        return _by_number({str(name): int(number) for name, number in numbers.items()})
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # the launcher has checked the manifests of own data; others need not be ours


def _by_number(numbers: Mapping[str, int]) -> list[str] | None:
    names = sorted(numbers, key=lambda name: numbers[name])
    complete = sorted(numbers.values()) == list(range(len(names)))
    are_numbers = all(name == str(number) for number, name in enumerate(names))
    return names if complete and not are_numbers else None
