"""Actions on a disk that may be full or may not answer for some minutes."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from launch.job.log import say
from mvd.config import ConfigError

PAUSES = (1, 2, 5, 10, 20, *[30] * 120)  # an hour
TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.EAGAIN}
Result = TypeVar("Result")


def with_disk(action: Callable[[], Result]) -> Result:
    """Repeats an action while the disk is full or does not answer."""
    for number, pause in enumerate(PAUSES):
        try:
            return action()
        except OSError as error:
            if error.errno not in TROUBLE:
                raise
            if number == 0:
                say(f"=== {error.filename or 'a file'}: {error.strerror}; waiting for the disk")
            time.sleep(pause)
    return action()


def try_to(name: str, action: Callable[[], Result]) -> Result | None:
    """Does something that the end of an attempt must not depend on; name: of the file, for the log."""
    try:
        return action()
    except (ConfigError, OSError) as error:
        say(f"=== {name}: {error}; going on")
        return None
