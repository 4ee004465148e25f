"""HMDB51's split lists: one file per class and split, all in one folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvd.config import ConfigError
from mvd.data.prepare.annotation_lists import Listed
from mvd.data.text_files import numbered_lines, read_text

SPLITS = {"1": "train", "2": "val"}  # 0: not used in this split
LINE = re.compile(r"(.*\S)\s+([012])")


def read_hmdb51(folder: Path, dataset: str | None, others: Mapping[str, Path]) -> dict[str, Sequence[Listed]]:
    """The training and test videos (split -> list; the test videos are the validation list) of one of the splits.

    folder: has `<class>_test_split<1, 2 or 3>.txt` of every class. dataset: hmdb51, hmdb51_split2 or hmdb51_split3.
    others: further lists of the command line, which must not be given.

    Raises:
        ConfigError: another data set, other lists, or files that are missing or have another format.
    """
    if dataset is None or not dataset.startswith("hmdb51"):
        raise ConfigError(
            f"{folder} is a folder; give the training list itself, or, for HMDB51's folder of lists, --dataset hmdb51 "
            "(hmdb51_split2, hmdb51_split3)"
        )
    if others:
        raise ConfigError(f"HMDB51's lists in {folder} have the test videos too; leave --{' and --'.join(others)} out")
    number = dataset.partition("_split")[2] or "1"
    ending = f"_test_split{number}.txt"
    files = sorted(folder.glob(f"*{ending}"))
    if not files:
        raise ConfigError(f"{folder} has no file *{ending}; give the folder of HMDB51's split lists")
    lists: dict[str, list[Listed]] = {"train": [], "val": []}
    for file in files:
        label = file.name.removesuffix(ending)
        for line_number, line in numbered_lines(read_text(file)):
            match = LINE.fullmatch(line)
            if match is None:
                raise ConfigError(f"{file}:{line_number}: expected `video 0`, `video 1` or `video 2`, got {line!r}")
            if match[2] in SPLITS:
                lists[SPLITS[match[2]]].append(Listed((Path(match[1]).stem,), label, f"{label}/{match[1]}"))
    return dict(lists)
