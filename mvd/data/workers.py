"""Set-up of the worker processes of loaders and of `mvd.data.prepare`."""

import atexit
import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# How loaders start their workers, whatever Python's default is (forkserver from 3.14 on). Forked workers share the
# sample list's memory and start at once. The fork server would be killed by the signals that SLURM sends to every
# process of a job, and its workers with it.
LOADER_START_METHOD = "fork"

SECONDS_TO_DIE = 5.0  # for a killed worker, which a disk that does not answer may hold for longer


def follow_parent() -> None:
    """Ignore the job's stop signals, and die with the parent (PR_SET_PDEATHSIG).

    The signals reach every process of the job. The parent handles them, and still needs the batches that its workers
    are preparing.
    """
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@atexit.register
def kill_workers() -> None:
    """Kill remaining workers: at exit, after an error in the middle of an epoch, or if a read hangs.

    Python's own atexit hook would send them SIGTERM, which they ignore, and then join them for ever. PyTorch's handler
    of SIGCHLD raises an error, wherever the process is by then, if a worker is killed: it must not see this.
    """
    workers = multiprocessing.active_children()
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(SECONDS_TO_DIE)
    signal.signal(signal.SIGCHLD, handler)


def keep_freed_memory() -> None:
    """Keep freed memory in this process (mallopt) instead of returning it to the kernel.

    Otherwise arrays of a clip's size are returned each time and faulted in again page by page: a third of the time of
    some augmentations.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value that glibc accepts
    libc.mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
