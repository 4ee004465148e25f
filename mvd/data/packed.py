"""A long list of samples in two arrays, for loader processes to share.

Each look at a Python object changes its reference count, and with that copies the memory page that a forked process
had in common with its parent: of a list of 240,436 entries, worker after worker would come to hold a copy.
"""

import os
from collections.abc import Sequence
from typing import overload

import numpy as np

from mvd.data.annotations import Entry


class PackedEntries(Sequence[Entry]):
    """Entries as they were given; each is made anew when it is asked for."""

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
        number = range(len(self))[index]  # IndexError ends an iteration
        path = self._paths[self._ends[number] : self._ends[number + 1]].tobytes()
        return Entry(os.fsdecode(path), int(self._labels[number]))
