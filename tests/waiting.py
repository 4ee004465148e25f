"""Waiting for processes, with one limit for all tests."""

import subprocess
import time
from collections.abc import Callable

LIMIT = 600.0  # seconds; it only ends a test that hangs, so it must hold on a machine that is far too busy


def wait_until(condition: Callable[[], object], run: subprocess.Popen[str] | None = None) -> None:
    """Waits for a condition; fails if `run` ends first, or after LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        assert run is None or run.poll() is None, "the process ended before the condition came true"
        time.sleep(0.05)
