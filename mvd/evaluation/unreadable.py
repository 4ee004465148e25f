"""Reports the videos that an evaluation could not read."""

import logging
from collections.abc import Sequence

from mvd.data.annotations import Entry
from mvd.distributed.process import gather

logger = logging.getLogger(__name__)


def report_unreadable(entries: Sequence[Entry], reasons: dict[int, str], consequence: str = "counted as wrong") -> int:
    """Logs the videos that any process could not read and returns their number; all processes call it together.

    reasons: index into `entries` -> why this process could not read it.
    """
    everyone = {index: reason for part in gather(reasons) for index, reason in part.items()}
    for index, reason in sorted(everyone.items()):
        logger.info("unreadable, %s: %s: %s", consequence, entries[index].path, reason)
    return len(everyone)
