"""Signals: a handler only sets a flag, and all processes stop together after the current update, with a checkpoint.

SIGUSR2 (a time limit or a preemption is near), SIGTERM and SIGINT (Ctrl-C) mean the same. A second SIGTERM or SIGINT
ends the process at once. SIGUSR1 asks for a checkpoint after the current update.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0  # a signal to a job reaches a process twice: directly, and through its launcher

_requested = False
_save_requests = 0
_insisted_at: float | None = None  # the first SIGTERM or SIGINT


class Interrupted(Exception):
    """The stage stopped because of a signal, on every process; starting it again continues from there.

    update: the update of the newest checkpoint; 0 if there is none, and in a test, which has no checkpoints.
    """

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message, update)
        self.update = update

    def __str__(self) -> str:
        return str(self.args[0])


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop; the other processes may not know yet."""
    return _requested


def save_requests() -> int:
    """How often a signal has asked this process for a checkpoint."""
    return _save_requests


@contextmanager
def signal_handlers() -> Iterator[None]:
    """Install the signal handlers for the block, then restore the previous ones."""
    global _requested, _save_requests, _insisted_at
    _requested, _save_requests, _insisted_at = False, 0, None
    previous = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _receive(number: int, _: FrameType | None) -> None:
    global _requested, _save_requests, _insisted_at
    if number == signal.SIGUSR1:
        _save_requests += 1
        return
    _requested = True
    if number == signal.SIGUSR2:
        return
    if _insisted_at is None:
        _insisted_at = time.monotonic()
    elif time.monotonic() - _insisted_at > SAME_REQUEST_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
