"""The progress line of a training or a test."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from mvd.flops import throughput_text

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15  # when the output is a file: one line each, instead of a line that is redrawn
DAY = 86400  # seconds


class _Bar(tqdm):  # type: ignore[type-arg]  # generic only in its stubs
    """tqdm with the days of long runs in its ETA."""

    @property
    def format_dict(self) -> dict[str, Any]:
        values = dict(super().format_dict)
        rate = values["rate"] or (values["n"] - values["initial"]) / (values["elapsed"] or 1)
        left = "?" if not rate else remaining((values["total"] - values["n"]) / rate)
        return {**values, "eta": left}


class Progress:
    """One line with stage, epoch, step, losses, samples/s and ETA; redrawn on a terminal, repeated in a log file."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.interactive = sys.stderr.isatty()
        self.shown_at = 0.0
        self.bar = _Bar(
            desc=title,
            total=total,
            initial=done,
            dynamic_ncols=True,
            file=sys.stderr if self.interactive else open(os.devnull, "w"),  # noqa: SIM115
            bar_format="{desc} {percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix} [{elapsed}, ETA {eta}]",
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


def remaining(seconds: float) -> str:
    """`04:05` (minutes and seconds), `3:04:05`, or `6 d 03 h` from two days on."""
    if seconds < 2 * DAY:
        return str(tqdm.format_interval(seconds))
    days, rest = divmod(int(seconds), DAY)
    return f"{days} d {rest // 3600:02} h"


def training_text(epochs: str, values: Mapping[str, float], unit: str) -> str:
    """The losses and the speed of a training's line. values: a report's; unit: of the samples, such as clips."""
    losses = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
    rate = values.get("samples_per_second")
    if rate is None:
        return f"epoch {epochs} {losses} (updates skipped)"
    return f"epoch {epochs} {losses} {rate:.1f} {unit}/s {throughput_text(values)}".rstrip()
