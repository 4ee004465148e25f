"""A DataLoader whose worker processes are known to have started."""

import ctypes
import logging
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
STARTS = 3


class StartedLoader(DataLoader[Any]):
    """As DataLoader, but iteration begins when every worker runs; workers that do not start are replaced.

    A process that is forked while another thread of its parent holds a lock may wait for that lock for ever. CPython
    3.11 has such a lock, which a thread holds for a moment when it starts or ends. Such a worker gives no batch, and
    the run would stand still until its watchdog ends it.
    """

    def __iter__(self) -> Any:
        """An iterator over the batches.

        Raises:
            RuntimeError: workers did not start, several times in a row.
        """
        if self.num_workers == 0:
            return super().__iter__()
        set_up = self.worker_init_fn
        for _ in range(STARTS):
            started = multiprocessing.RawArray(ctypes.c_bool, self.num_workers)
            self.worker_init_fn = partial(_note_start, set_up, started)
            before = set(multiprocessing.active_children())
            batches: Any = super().__iter__()
            self.worker_init_fn = set_up
            workers = set(multiprocessing.active_children()) - before
            deadline = time.monotonic() + START_SECONDS
            while not all(started) and time.monotonic() < deadline and all(worker.is_alive() for worker in workers):
                time.sleep(0.002)
            if all(started) or time.monotonic() < deadline:  # the DataLoader itself reports a worker that has died
                return batches
            logger.warning("a DataLoader worker has not started within %g s; starting all again", START_SECONDS)
            batches._shutdown_workers()  # from here on, PyTorch takes no dead worker for an error
            for worker in workers:
                worker.kill()
        raise RuntimeError(f"DataLoader workers have not started within {START_SECONDS:g} s (tries: {STARTS})")


def _note_start(set_up: Callable[[int], None] | None, started: Any, number: int) -> None:
    try:
        if set_up is not None:
            set_up(number)
    finally:  # its error is sent with the first batch
        started[number] = True
