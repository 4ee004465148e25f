"""A timeout for reading one file, which logs the file that hangs."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mvd.data.video.errors import Unreadable
from mvd.distributed.exit_codes import RETRYABLE
from mvd.files import append_text
from mvd.host import hostname

logger = logging.getLogger(__name__)

MAX_HANGS = 2  # attempts that may hang on a file before it is treated as unreadable


@dataclass(frozen=True)
class ReadTimeout:
    """Timeout for reading one file, in seconds, and the log of files that exceeded it; no log means no timeout.

    A read that hangs can only be ended by ending its process. The next attempt tries the file once more, since the
    disk may be to blame; after that it is treated as unreadable. If two processes hang on a file in one attempt, both
    log it with the same count. others: logs of further runs that use the same data in the same processes.
    """

    seconds: float = 0.0
    log: Path | None = None
    hung: Mapping[str, int] = field(default_factory=dict)  # file -> number of earlier attempts that hung on it
    others: Sequence[Path] = ()

    @classmethod
    def of_run(cls, log: Path, seconds: float, others: Sequence[Path] = ()) -> "ReadTimeout":
        """The timeout for a run's files, with the hangs that earlier attempts logged, its own and those of others."""
        hung: dict[str, int] = {}
        lines = [line for each in (log, *others) if each.exists() for line in each.read_text("utf-8").split("\n")]
        for line in lines:
            times, _, path = line.partition(" ")
            if times.isdigit():  # a full disk may have cut the line off
                hung[path] = max(int(times), hung.get(path, 0))
        return cls(seconds, log, hung, others)

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Exits this process if the block takes too long.

        Raises:
            Unreadable: earlier attempts hung on it.
        """
        times = self.hung.get(path, 0)
        if times >= MAX_HANGS:
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
        logger.error(
            f"FAULT (stall): {hostname()} has been reading {path} for {self.seconds:g} s; the run exits so that it can "
            f"be restarted; a file that hangs {MAX_HANGS} times is treated as unreadable"
        )
        try:
            for log in (self.log, *self.others):
                self._append(log, f"{self.hung.get(path, 0) + 1} {path}\n")
        finally:
            os._exit(RETRYABLE)

    @staticmethod
    def _append(log: Path | None, line: str) -> None:
        try:
            if log is not None:
                append_text(log, line)
        except OSError as error:
            logger.error(f"FAULT (log): {log} cannot be written: {error}")
