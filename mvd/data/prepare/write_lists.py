"""What prepare writes of a data set: its lists, the quarantined files, and the manifest."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvd.config import DATASETS
from mvd.data.annotations import MANIFEST
from mvd.data.prepare.checking import Record
from mvd.data.prepare.find_videos import Found
from mvd.data.prepare.video_files import MISSING
from mvd.files import write_json, write_text

Counts = dict[str, Counter[str]]  # split -> listed, good, broken, missing, repeated


class Quarantined(NamedTuple):
    """A video that is not in the lists, and why.

    kind: broken, missing or repeated. temporary: the reason may pass, so the file is checked again by the next run.
    """

    split: str
    name: str
    kind: str
    reason: str
    temporary: bool = False


def sort_out(
    found: Sequence[Found], records: Mapping[str, Record]
) -> tuple[dict[str, dict[str, int]], list[Quarantined]]:
    """The good videos of each split (path -> class index), and the others."""
    good: dict[str, dict[str, int]] = {}
    others: list[Quarantined] = []
    for item in found:
        lines = good.setdefault(item.split, {})
        record = None if item.path is None else records.get(str(item.path))
        if item.path is None:
            kind = "missing" if item.reason == MISSING else "broken"
            others.append(Quarantined(item.split, item.name, kind, item.reason))
        elif record is None:
            others.append(Quarantined(item.split, item.name, "broken", "it has not been checked", temporary=True))
        elif record.path is None:
            reason = record.reason or "unknown"
            others.append(Quarantined(item.split, item.name, "broken", reason, record.temporary))
        elif record.path in lines:
            same = lines[record.path] == item.label
            reason = "its file is in the list already" + ("" if same else " with another class")
            others.append(Quarantined(item.split, item.name, "repeated", reason))
        else:
            lines[record.path] = item.label
    return good, others


def write_lists(good: Mapping[str, Mapping[str, int]], quarantined: Sequence[Quarantined], output: Path) -> None:
    """Writes <split>.csv and quarantine.tsv; without a test list, the validation videos are the test list."""
    for split, lines in good.items():
        text = "".join(f"{_relative(path, output)} {label}\n" for path, label in lines.items())
        write_text(output / f"{split}.csv", text)
        if split == "val" and "test" not in good:
            write_text(output / "test.csv", text)
    rows = ((item.split, printable(item.name), printable(item.reason)) for item in quarantined)
    write_text(output / "quarantine.tsv", "".join("\t".join(row) + "\n" for row in rows))


def printable(text: str) -> str:
    """The text with line breaks, tabs and bytes that are not UTF-8 escaped."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", lambda match: repr(match[0])[1:-1], escaped)


def count(good: Mapping[str, Mapping[str, int]], quarantined: Sequence[Quarantined]) -> Counts:
    """The number of videos of each split and kind."""
    counts: Counts = {}
    for split, lines in good.items():
        kinds = Counter(item.kind for item in quarantined if item.split == split)
        values = {"good": len(lines), "broken": kinds["broken"], "missing": kinds["missing"]}
        values["repeated"] = kinds["repeated"]
        counts[split] = Counter({"listed": sum(values.values()), **values})
    return counts


def write_manifest(
    output: Path,
    counts: Counts,
    records: Sequence[Record],
    classes: Mapping[str, int],
    request: Mapping[str, Any],
) -> None:
    """manifest.json: counts beside the paper's, totals, classes, and the facts of every good file in the lists.

    request: what was asked for (mvd.data.prepare.request), which the next command for this folder is compared with.
    """
    dataset = request["dataset"]
    facts: dict[str, Any] = {
        _relative(record.path, output): record.facts for record in records if record.path is not None
    }
    totals = {name: sum(fact[name] for fact in facts.values()) for name in ("frames", "seconds", "bytes")}
    splits = {split: {**values, "paper": paper_count(dataset, split)} for split, values in counts.items()}
    in_order = dict(sorted(classes.items(), key=lambda item: item[1]))
    write_json(
        output / MANIFEST,
        {
            "dataset": dataset,
            "request": dict(request),
            "splits": splits,
            "totals": totals,
            "classes": in_order,
            "files": facts,
        },
    )


def paper_count(dataset: str | None, split: str) -> int | None:
    """The number of videos that the paper used; None for other data sets."""
    if dataset is None:
        return None
    return DATASETS[dataset].train_samples if split == "train" else DATASETS[dataset].val_samples


def _relative(path: str, output: Path) -> str:
    return os.path.relpath(path, output) if Path(path).is_relative_to(output) else path
