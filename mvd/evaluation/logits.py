"""The files with the logits of a test, one per process."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvd.config import ConfigError
from mvd.data.annotations import Entry
from mvd.files import write_atomically


class Logits(NamedTuple):
    """float32 logits (N, V, C) of N videos, their indices in the list of test videos and their labels, (N,) each."""

    logits: NDArray[np.float32]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def none(cls, views: int, classes: int) -> "Logits":
        """The logits of no videos."""
        return cls(np.zeros((0, views, classes), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def where(self, wanted: NDArray[np.bool_]) -> "Logits":
        """The logits of some of the videos; wanted: (N,)."""
        return Logits(self.logits[wanted], self.indices[wanted], self.labels[wanted])


def concatenate(parts: Sequence[Logits]) -> Logits:
    """The logits of all videos of all parts."""
    return Logits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def save_logits(path: Path, logits: Logits, entries: Sequence[Entry]) -> None:
    """Writes a process's logits, with a digest of the list of test videos."""

    def write(temporary: Path) -> None:
        arrays: dict[str, Any] = logits._asdict()
        with open(temporary, "wb") as handle:
            np.savez(handle, list=_digest(entries), **arrays)

    write_atomically(path, write)


def read_logits(path: Path, entries: Sequence[Entry] | None) -> Logits | None:
    """The logits that a process wrote for this list of videos, or None; without a list, whatever the file holds.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as content:
            if entries is not None and ("list" not in content or content["list"] != _digest(entries)):
                return None
            return Logits(*(content[name] for name in Logits._fields))
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is damaged; delete it and test again") from error


def _digest(entries: Sequence[Entry]) -> str:
    return hashlib.sha256("\n".join(f"{entry.path} {entry.label}" for entry in entries).encode()).hexdigest()
