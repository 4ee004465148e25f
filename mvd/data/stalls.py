"""A time limit for reading one file, which names the file that hangs."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mvd.data.unreadable import Unreadable
from mvd.host import hostname

HANGING = "hanging.txt"
CHANCES = 2  # attempts that may hang on a file before it counts as unreadable
HUNG = 76  # exit code of a process that gave up waiting: the run is worth another attempt


@dataclass(frozen=True)
class ReadLimit:
    """How long reading a file may take, in seconds, and where the files that took longer are listed; none: for ever.

    Nothing can be done about a read that hangs but to end its process. The next attempt tries the file once more,
    since the disk may be to blame; after that it counts as unreadable at once. Two processes that hang on a file in
    one attempt both list it as the same time.
    """

    seconds: float = 0.0
    log: Path | None = None
    hung: Mapping[str, int] = field(default_factory=dict)  # file -> earlier attempts that it has ended

    @classmethod
    def of_run(cls, directory: Path, seconds: float) -> "ReadLimit":
        """The limit for a run's files, and what its earlier attempts have met."""
        log = directory / HANGING
        hung: dict[str, int] = {}
        for line in log.read_text().splitlines() if log.exists() else []:
            times, _, path = line.partition(" ")
            if times.isdigit():  # not where a full disk has cut the line off
                hung[path] = max(int(times), hung.get(path, 0))
        return cls(seconds, log, hung)

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Ends this process where the block takes too long.

        Raises:
            Unreadable: earlier attempts have hung on it.
        """
        times = self.hung.get(path, 0)
        if times >= CHANCES:
            raise Unreadable(path, f"reading it took more than {self.seconds:g} s, {times} times")
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
            f"FAULT (stall): {hostname()} has been reading {path} for {self.seconds:g} s; the run ends, to "
            f"be started again; a file that hangs {CHANCES} times counts as unreadable",
            file=sys.stderr,
            flush=True,
        )
        try:
            with open(self.log, "a") as handle:
                handle.write(f"{self.hung.get(path, 0) + 1} {path}\n")
        except OSError as error:
            print(f"FAULT (log): {self.log} cannot be written: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(HUNG)
