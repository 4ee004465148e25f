"""A timeout for reading one file, which logs the file that hangs."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
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
    log it with the same count.
    """

    seconds: float = 0.0
    log: Path | None = None
    hung: Mapping[str, int] = field(default_factory=dict)  # file -> number of earlier attempts that hung on it

    @classmethod
    def of_run(cls, log: Path, seconds: float) -> "ReadTimeout":
        """The timeout for a run's files, with the hangs that its earlier attempts logged."""
        hung: dict[str, int] = {}
        for line in log.read_text(encoding="utf-8").split("\n") if log.exists() else []:
            times, _, path = line.partition(" ")
            if times.isdigit():  # a full disk may have cut the line off
                hung[path] = max(int(times), hung.get(path, 0))
        return cls(seconds, log, hung)

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
            if self.log is not None:
                append_text(self.log, f"{self.hung.get(path, 0) + 1} {path}\n")
        except OSError as error:
            logger.error(f"FAULT (log): {self.log} cannot be written: {error}")
        finally:
            os._exit(RETRYABLE)
