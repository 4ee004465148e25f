"""Where a run's numbers go: the extension point, and the writers there are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from mvd.files import append_text, read_json_lines, write_text
from mvd.stage import Stage

SECTIONS = {  # TensorBoard's headings and what is under them; the rest, above all the losses, is under "training"
    "schedule": ("epochs_done", "lr", "weight_decay"),
    "validation": ("val_top1", "val_unreadable"),
    "speed": ("samples_per_second", "data_wait_share", "decode_ms", "loader_queue", "memory_gb"),
    "faults": ("loss_spike", "failed_saves", "unreadable", "replaced"),
}


class Writer(Protocol):
    """Takes the numbers, pictures and texts of a run, on its first process only; x is the update.

    Any method but the constructor may raise OSError (a full or read-only disk): the caller logs it, goes on, and calls
    `open` again before the next write. A writer that has no use for a kind of content ignores it.
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
    """The writers of a run; to add one, append it here. What was written after update `resumed_at` is dropped."""
    return [JsonLines(stage.files.metrics, resumed_at), TensorBoard(stage.files.tensorboard, resumed_at)]


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
    """TensorBoard events, under the headings of SECTIONS."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        self.folder = folder
        self.purge_step: int | None = resumed_at + 1

    def open(self) -> None:
        self.events = SummaryWriter(str(self.folder), purge_step=self.purge_step)
        self.purge_step = None  # after a failure, whose thread has ended, it goes on where it was

    def scalars(self, update: int, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(tag(name), value, update)

    def image(self, update: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.events.add_image(name, pixels, update, dataformats="HWC")

    def text(self, update: int, name: str, markdown: str) -> None:
        self.events.add_text(name, markdown, update)

    def hyperparameters(self, values: Mapping[str, str | float | bool]) -> None:
        self.events.add_hparams(dict(values), {}, run_name=".")

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        self.events.close()


def tag(name: str) -> str:
    """What TensorBoard calls a number, for instance `speed/memory_gb`."""
    section = next((section for section, names in SECTIONS.items() if name in names), "training")
    return f"{section}/{name}"
