"""What the worker processes of loaders and of `mvd.data.prepare` have in common."""

import atexit
import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
OF_THE_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def follow_parent() -> None:
    """Makes this process deaf to what asks the parent to stop, and dead when the parent is.

    Those signals reach the whole job; the parent answers them, and what a worker is at is still wanted then.
    """
    for number in OF_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def kill_workers() -> None:
    """Ends those that are left: after an error in the middle of an epoch, or where a read hangs.

    At its exit Python would ask them to leave by a signal that they do not hear, and then wait for ever.
    """
    for worker in multiprocessing.active_children():
        worker.kill()


def keep_freed_memory() -> None:
    """Has memory that is freed stay with this process, as far as glibc lets it be said.

    Arrays of a clip's size would otherwise go back to the system each time, and come anew page by page: a third of the
    time of some augmentations.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that is accepted
    libc.mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
