"""The row file that prepare writes for a data set of your own, with settings that fit its size."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mvd.config import SIZES, Augmentation, Dataset, Finetune, Mixing, Optimization, Test
from mvd.data.prepare.cost import describe_cost
from mvd.data.prepare.write_lists import Counts
from mvd.files import write_text

# Size -> the row of experiments/ whose student is fine-tuned; the tiny network starts from random weights.
STUDENTS: dict[str, str | None] = {
    "small": "vits_from_vitl_k400",
    "base": "vitb_from_vitl_k400",
    "large": "vitl_e800_k400",
    "huge": "vith_k400",
    "tiny": None,
}
PAPER_BATCH, PAPER_PEAK = 384, 7.5e-4  # batch and peak learning rate of ViT-S and ViT-B on Kinetics-400

HEAD = '''"""{title}

Written by mvd.data.prepare; change it as you like. If labels depend on left and right, set flip=0 in the augmentation.
Dense sampling takes clips of 16 frames, every stride-th; sampling="segment" spreads 16 frames over the whole video.
{start}
"""

'''


class Written(NamedTuple):
    """A row file, whether it was there already, and what its row costs (mvd.data.prepare.cost).

    facts: of the data set, as a row must declare them. needs_weights: whether it starts from a distilled student.
    """

    file: Path
    kept: bool
    cost: str
    facts: Dataset
    needs_weights: bool

    @property
    def outdated(self) -> list[str]:
        """The numbers that a row file declares of an earlier state of the data set, as `name=value` that it needs."""
        declared = self.file.read_text(encoding="utf-8") if self.kept else ""
        wanted = {name: getattr(self.facts, name) for name in ("classes", "train_samples", "val_samples")}
        found = {name: re.search(rf"\b{name}=(\d+)", declared) for name in wanted}
        return [f"{name}={value}" for name, value in wanted.items() if (m := found[name]) and int(m[1]) != value]


def write_row(name: str, facts: Dataset, size: str | None, frames: int, output: Path) -> Written | None:
    """Writes OUTPUT/<name>.py, or <name>_<size>.py if a size is given, unless there is such a file.

    None if the data set cannot be trained on: it has no validation videos, or fewer than two training videos.
    """
    if facts.val_samples == 0 or facts.train_samples < 2:
        return None
    row = name if size is None else f"{name}_{SIZES[size].short_name}"
    file = output / f"{row}.py"
    finetune, test = recipes_for(name, facts, size or "small", frames)
    kept = file.exists()
    if not kept:
        write_text(file, row_text(row, finetune, test, output))
    return Written(file, kept, describe_cost(finetune, test), facts, size != "tiny")


def recipes_for(name: str, facts: Dataset, size: str, frames: int) -> tuple[Finetune, Test]:
    """A fine-tuning and a test on the data set `name`. frames: of a typical video of it.

    facts has at least two training videos. The batch is at most a quarter of them, and the mixing group at most eight.
    """
    shared: dict[str, Any] = {"size": size, "dataset": name, "own_dataset": facts, "sampling": facts.sampling}
    shared["stride"] = max(1, min(4, frames // 16))  # of short videos, a clip spans the whole video
    finetune = _tiny(facts, shared) if size == "tiny" else _pretrained(facts, shared, size in ("large", "huge"))
    return finetune, Test(**shared, clips=facts.test_clips)


def _tiny(facts: Dataset, shared: dict[str, Any]) -> Finetune:
    """About a thousand updates from random weights, as in the demo."""
    batch = _batch(facts, 16)
    epochs = max(5, min(200, 1000 // (facts.train_samples // batch)))
    return Finetune(
        **shared,
        drop_path=0.0,
        augmentation=Augmentation(auto=None, crop_scale=(0.7, 1.0), erase=0.0, samples=1),
        mixing=Mixing(mixup=0.1, cutmix=0.0, group=min(batch, 8)),
        optimization=_optimization(batch, epochs, 3e-3, 0.01, betas=(0.9, 0.95)),
    )


def _pretrained(facts: Dataset, shared: dict[str, Any], large: bool) -> Finetune:
    """As the paper's on Kinetics-400; the peak learning rate follows the square root of the batch."""
    batch = _batch(facts, 256)
    epochs = 100 if facts.train_samples < 20_000 else 75
    peak = PAPER_PEAK * math.sqrt(batch / PAPER_BATCH)
    return Finetune(
        **shared,
        drop_path=0.3 if large else 0.1,
        head_dropout=0.5 if large else 0.0,
        activation_checkpointing=large,
        mixing=Mixing(group=min(batch, 8), cutmix_axes="spatial"),
        optimization=_optimization(batch, epochs, peak, 0.002, betas=(0.9, 0.999), layer_decay=0.75),
    )


def _optimization(batch: int, epochs: int, peak: float, floor: float, **fields: Any) -> Optimization:
    """floor: the last learning rate as a share of the peak."""
    base_lr = float(f"{peak * 256 / batch:.1e}")
    return Optimization(
        global_batch=batch,
        epochs=epochs,
        warmup_epochs=max(1, epochs // 20),
        base_lr=base_lr,
        min_lr=float(f"{base_lr * floor:.1e}"),
        micro_batch=min(batch, 8),
        **fields,
    )


def _batch(facts: Dataset, largest: int) -> int:
    """The largest power of two up to `largest` and a quarter of the training videos, but at least 2."""
    limit = max(2, min(facts.train_samples // 4, largest))
    return 1 << (limit.bit_length() - 1)


def facts_of(counts: Counts, classes: int) -> Dataset:
    """The record of a data set with these lists."""
    train, val = (counts.get(split, Counter())["good"] for split in ("train", "val"))
    return Dataset(classes=classes, train_samples=max(train, 1), val_samples=val)


def row_text(row: str, finetune: Finetune, test: Test, root: Path) -> str:
    """The Python code of a row file. row: its name; root: the data set's folder, for the title."""
    student = STUDENTS[finetune.size]
    head, sections, start = "", [], "It starts from random weights."
    if student is not None:
        head = f"from experiments.{student} import row as student\n"
        sections = [f"    {name}=student.{name},\n" for name in ("image_teacher", "video_teacher", "pretrain")]
        start = (
            f"The network starts from the student of {student}; pretrain.weights=FILE gives a file with its weights."
        )
    sections += [f"    {name}={_code(value, 4)},\n" for name, value in (("finetune", finetune), ("test", test))]
    code = "".join(sections)
    kinds = (kind.__name__ for kind in (Augmentation, Finetune, Mixing, Optimization, Test))
    names = sorted({"Dataset", "Row", *(name for name in kinds if f"{name}(" in code)})
    title = f"Fine-tunes the {finetune.size} network on the videos of {json.dumps(str(root), ensure_ascii=False)}."
    head = HEAD.format(title=title.replace("\\", "\\\\"), start=start) + head
    facts = ", ".join(f"{name}={value!r}" for name, value in _changed(test.own_dataset))
    return (
        f"{head}from mvd.config import {', '.join(names)}\n\nFACTS = Dataset({facts})\n\n"
        f'row = Row(\n    name="{row}",\n{code})\n'
    )


def _code(value: Any, indent: int) -> str:
    """A recipe as Python code, without the fields that have their default values."""
    if isinstance(value, Dataset):
        return "FACTS"
    if not dataclasses.is_dataclass(value):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    space = " " * (indent + 4)
    lines = "".join(f"{space}{name}={_code(given, indent + 4)},\n" for name, given in _changed(value))
    return f"{type(value).__name__}(\n{lines}{' ' * indent})"


def _changed(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass that do not have their default values."""
    found = []
    for field in dataclasses.fields(value):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if (given := getattr(value, field.name)) != default:
            found.append((field.name, given))
    return found
