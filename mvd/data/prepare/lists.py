"""What prepare writes of a data set: its lists, the quarantined files, and the manifest."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from mvd.config import DATASETS
from mvd.data.annotations import MANIFEST
from mvd.data.prepare.checking import Record
from mvd.data.prepare.listing import Found
from mvd.files import write_json, write_text


def write_lists(found: list[Found], records: dict[str, Record], output: Path) -> dict[str, Counter]:
    """Writes <split>.csv and quarantine.tsv; returns each split's counts of good, broken and missing videos."""
    counts: dict[str, Counter] = {}
    quarantine = []
    for split in {item.split: None for item in found}:
        lines: dict[str, int] = {}
        counts[split] = Counter(listed=0, good=0, broken=0, missing=0, repeated=0)
        for item in (item for item in found if item.split == split):
            counts[split]["listed"] += 1
            record = None if item.path is None else records[str(item.path)]
            if record is None or record.path is None:
                reason = "no such file" if record is None else record.reason
                counts[split]["missing" if record is None else "broken"] += 1
                quarantine.append(f"{split}\t{item.name}\t{reason}\n")
            elif record.path in lines:
                counts[split]["repeated"] += 1
                quarantine.append(f"{split}\t{item.name}\tits file is in the list already\n")
            else:
                counts[split]["good"] += 1
                lines[record.path] = item.label
        write_text(output / f"{split}.csv", "".join(f"{_relative(p, output)} {n}\n" for p, n in lines.items()))
    write_text(output / "quarantine.tsv", "".join(quarantine))
    if "test" not in counts and "val" in counts:  # accuracy is measured on the validation videos
        write_text(output / "test.csv", (output / "val.csv").read_text(encoding="utf-8"))
    return counts


def _relative(path: str, output: Path) -> str:
    return os.path.relpath(path, output) if Path(path).is_relative_to(output) else path


def write_manifest(
    output: Path, counts: dict[str, Counter], records: dict[str, Record], numbers: dict[str, int], dataset: str | None
) -> None:
    """manifest.json: counts beside the paper's, totals, classes and the facts of every good file."""
    good = (record for record in records.values() if record.path is not None)
    facts: dict[str, Any] = {_relative(record.path, output): record.facts for record in good}
    totals = {name: sum(fact[name] for fact in facts.values()) for name in ("frames", "seconds", "bytes")}
    splits = {split: {**count, "paper": paper_count(dataset, split)} for split, count in counts.items()}
    classes = dict(sorted(numbers.items(), key=lambda item: item[1]))
    write_json(
        output / MANIFEST,
        {"dataset": dataset, "splits": splits, "totals": totals, "classes": classes, "files": facts},
    )


def paper_count(dataset: str | None, split: str) -> int | None:
    if dataset is None:
        return None
    return DATASETS[dataset].train_samples if split == "train" else DATASETS[dataset].val_samples
