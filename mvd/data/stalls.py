"""A time limit for reading one file, which names the file that hangs."""

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mvd.data.unreadable import Unreadable

HANGING = "hanging.txt"
CHANCES = 2  # attempts that may hang on a file before it counts as unreadable
HUNG = 76  # exit code of a process that gave up waiting: the run is worth another attempt


@dataclass(frozen=True)
class ReadLimit:
    """How long reading a file may take, in seconds, and where the files that took longer are listed; none: for ever.

    Nothing can be done about a read that hangs but to end its process. The next attempt tries the file once more,
    since the disk may be to blame; after that it counts as unreadable at once.
    """

    seconds: float = 0.0
    log: Path | None = None
    given_up: frozenset[str] = frozenset()  # files that earlier attempts have hung on too often

    @classmethod
    def of_run(cls, directory: Path, seconds: float) -> "ReadLimit":
        """The limit for a run's files, and what its earlier attempts have met."""
        log = directory / HANGING
        hung = Counter(log.read_text().splitlines() if log.exists() else [])
        return cls(seconds, log, frozenset(path for path, times in hung.items() if times >= CHANCES))

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Ends this process where the block takes too long.

        Raises:
            Unreadable: earlier attempts have hung on it.
        """
        if path in self.given_up:
            raise Unreadable(path, f"reading it took more than {self.seconds:g} s, {CHANCES} times")
        if self.log is None:
            yield
            return
        timer = threading.Timer(self.seconds, self._give_up, [path])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, path: str) -> None:
        print(
            f"FAULT (stall): {socket.gethostname()} has been reading {path} for {self.seconds:g} s; the run ends, to "
            f"be started again; a file that hangs {CHANCES} times counts as unreadable",
            file=sys.stderr,
            flush=True,
        )
        with open(self.log, "a") as handle:
            handle.write(f"{path}\n")
        os._exit(HUNG)
