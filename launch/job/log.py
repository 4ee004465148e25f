"""The log of a job, which may be on a full disk."""

import contextlib


def say(message: object) -> None:
    """Prints a line to the job's log; if the disk does not take it, the line is lost and the job goes on."""
    with contextlib.suppress(OSError):
        print(message, flush=True)
