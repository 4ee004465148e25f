"""A long list of samples in arrays that forked loader processes share.

Reading a Python object changes its reference count, so the memory page that a forked process shares with its parent is
copied: every worker would end up with its own copy of a list of 240,436 entries.
"""

import os
from collections.abc import Sequence
from typing import overload

import numpy as np

from mvd.data.annotations import Entry


class PackedEntries(Sequence[Entry]):
    """A read-only sequence of entries, each created when it is accessed."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        paths = [os.fsencode(entry.path) for entry in entries]
        self._paths = np.frombuffer(b"".join(paths), np.uint8)
        self._ends = np.cumsum([0, *map(len, paths)])
        self._labels = np.array([entry.label for entry in entries], np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...

    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError, which ends iteration
        path = self._paths[self._ends[number] : self._ends[number + 1]].tobytes()
        return Entry(os.fsdecode(path), int(self._labels[number]))
