"""The progress line of a training or a test."""

import logging
import os
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15  # when the output is a file: one line each, instead of a line that is redrawn


class Progress:
    """One line with stage, epoch, step, losses, samples/s and ETA; redrawn on a terminal, repeated in a log file."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.interactive = sys.stderr.isatty()
        self.shown_at = 0.0
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            dynamic_ncols=True,
            file=sys.stderr if self.interactive else open(os.devnull, "w"),  # noqa: SIM115
            bar_format="{desc} {percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix} [{elapsed}, ETA {remaining}]",
        )

    def show(self, update: int, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(update - self.bar.n)
        last = update == self.bar.total
        if not self.interactive and (last or time.monotonic() - self.shown_at > SECONDS_BETWEEN_LINES):
            self.shown_at = time.monotonic()
            logger.info(str(self.bar))

    def close(self) -> None:
        self.bar.close()
