"""What the worker processes of loaders and of `mvd.data.prepare` have in common."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
OF_THE_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def follow_parent() -> None:
    """Makes this process deaf to what asks the parent to stop, and dead when the parent is.

    Those signals reach the whole job; the parent answers them, and what a worker is at is still wanted then.
    """
    for number in OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
