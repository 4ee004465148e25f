"""The log of a job, which may be on a full disk."""

import contextlib
import sys


def say(message: object) -> None:
    """Prints a line to the job's log; if the disk does not take it, the line is lost and the job goes on.

    To stderr, which is the same file: the batch script reads what launch.job.attempts prints to stdout.
    """
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
