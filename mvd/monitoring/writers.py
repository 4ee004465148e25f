"""The Writer protocol, and the JSON Lines and TensorBoard writers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mvd.config import Kind
from mvd.files import append_text, read_json_lines, write_text
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

SECTIONS = {  # of metrics without a section in their name; the rest, such as losses, has the stage's kind as section
    "validation": ("val_top1", "val_loss", "val_unreadable"),
    "speed": ("samples_per_second", "data_wait_share", "decode_ms", "loader_queue", "memory_gb"),
    "schedule": ("epochs_done", "lr", "weight_decay", "grad_norm"),
    "faults": ("loss_spike", "failed_saves", "unreadable", "replaced"),
}
# TensorBoard sorts sections by name: numbers put the loss first.
NUMBERED = {section: f"{number}_{section}" for number, section in enumerate(SECTIONS, start=2)}

# The charts of TensorBoard's tab "Custom Scalars": category -> chart -> patterns of the curves that share the chart.
LAYOUT = {
    "losses": {
        "pre-training: both teachers' parts": ["1_pretrain/.*loss$"],
        "fine-tuning: training and validation": ["1_finetune/loss$", "2_validation/val_loss$"],
    },
    "accuracy in percent": {
        "pre-training: k-NN probe": ["probe/knn_top1$"],
        "fine-tuning: validation, one view": ["2_validation/val_top1$"],
    },
    "speed": {
        "samples/s": ["3_speed/samples_per_second$"],
        "seconds before waiting for the others: median and slowest process": ["3_speed/.*rank_seconds$"],
        "shares: waiting for data, MFU": ["3_speed/data_wait_share$", "3_speed/mfu$"],
    },
    "stability": {
        "gradient norm": ["4_schedule/grad_norm$"],
        "unreadable and replaced videos": ["5_faults/(unre|repl).*"],
    },
    "teachers": {"image and video teacher: loss": ["1_.*_teacher/loss$"]},
}


class Writer(Protocol):
    """Receives the metrics, images and texts of a run, on its first process only; the x axis is the update.

    Any method except the constructor may raise OSError (a full or read-only disk): the caller logs it, continues, and
    calls `open` again before the next write. A writer ignores the kinds of content that it does not support.
    """

    def open(self) -> None:
        """Called before the first write, and before the next one after a failure."""
        ...

    def scalars(self, update: int, epoch: int, values: Mapping[str, float]) -> None: ...

    def image(self, update: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """pixels: (H, W, 3), RGB."""
        ...

    def text(self, update: int, name: str, markdown: str) -> None: ...

    def hyperparameters(self, values: Mapping[str, str | float | bool]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def build_writers(stage: Stage, resumed_at: int) -> list[Writer]:
    """The writers of a run; to add one, append it here. Records after update `resumed_at` are dropped."""
    return [JsonLines(stage.files.metrics, resumed_at), TensorBoard(stage.files, stage.kind, resumed_at)]


class JsonLines:
    """One line of JSON per record, of scalars only. Records that the disk refuses are kept and written later."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path, self.resumed_at = path, resumed_at
        self.pending: list[str] = []
        self.is_open = False

    def open(self) -> None:
        if not self.is_open and self.path.exists():
            kept = [record for record in read_json_lines(self.path) if record["update"] <= self.resumed_at]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.is_open = True

    def scalars(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        self.pending.append(json.dumps({"update": update, "epoch": epoch, **values}) + "\n")
        self.flush()

    def image(self, update: int, name: str, pixels: NDArray[np.uint8]) -> None: ...

    def text(self, update: int, name: str, markdown: str) -> None: ...

    def hyperparameters(self, values: Mapping[str, str | float | bool]) -> None: ...

    def flush(self) -> None:
        if self.pending and self.is_open:
            append_text(self.path, "".join(self.pending))
            self.pending.clear()

    def close(self) -> None:
        self.flush()


class TensorBoard:
    """TensorBoard events, in the run directory itself: TensorBoard names a run after its folder."""

    def __init__(self, files: RunDirectory, kind: Kind, resumed_at: int) -> None:
        self.files, self.kind = files, kind
        self.purge_step: int | None = resumed_at + 1

    def open(self) -> None:
        for older in self.files.older_events():
            older.rename(self.files.path / older.name)
        self.events = SummaryWriter(str(self.files.path), purge_step=self.purge_step)
        self.purge_step = None  # reopened after a failure, it continues without purging
        charts = {title: {name: ["Multiline", tags] for name, tags in part.items()} for title, part in LAYOUT.items()}
        self.events.add_custom_scalars(charts)

    def scalars(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(tag(name, self.kind), value, update)

    def image(self, update: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.events.add_image(name, pixels, update, dataformats="HWC")

    def text(self, update: int, name: str, markdown: str) -> None:
        self.events.add_text(name, markdown, update)

    def hyperparameters(self, values: Mapping[str, str | float | bool]) -> None:
        # SummaryWriter.add_hparams would open a second event file, after which TensorBoard stops reading the first.
        # Without the list of columns, TensorBoard shows the settings of all kinds of stages, and all curves as results.
        _columns, *session = hparams(dict(values), {})
        for summary in session:
            self.events._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        self.events.close()


def tag(name: str, kind: Kind) -> str:
    """TensorBoard's name of a metric, for instance `3_speed/memory_gb`, or `1_pretrain/loss`.

    The kind in the section keeps curves of pre-training and fine-tuning, which count different updates, in separate
    charts, and files the accuracy of a test under `1_test`.
    """
    section, slash, rest = name.partition("/")
    if slash:
        return f"{NUMBERED.get(section, section)}/{rest}"
    section = next((NUMBERED[section] for section, names in SECTIONS.items() if name in names), f"1_{kind}")
    return f"{section}/{name}"
