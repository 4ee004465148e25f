"""Exit codes of training and test processes, and of the commands."""

import contextlib
import os
import sys
from typing import NoReturn

OK = 0
INVALID = 2  # a setting or input is invalid; restarting does not help
STOPPED = 75  # stopped by a signal, with everything saved (EX_TEMPFAIL of sysexits.h)
RETRYABLE = 76  # a process or a host was lost: start again, on other hosts if possible


def leave(code: int) -> NoReturn:
    """Ends this process at once with an exit code; workers of loaders end with it (mvd.data.workers).

    Python's own exit may wait for threads of gloo until srun kills the process, and an error in it changes the code to
    1: PyTorch raises one if a worker of a loader dies meanwhile.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
