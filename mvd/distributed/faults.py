"""Faults of a run: one line of faults.jsonl each, and an error in the log; and the errors that end a run."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from mvd.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """The run cannot continue, and restarting it would not help; one sentence says why. Raised on every rank."""


class HostFault(RuntimeError):
    """Some hosts cannot take part in the run; another attempt without them can succeed."""


class PeerLost(RuntimeError):
    """Another rank, or a data loader process of this one, is gone; the run can be restarted."""


def record_fault(
    files: RunDirectory, kind: str, message: str, update: int | None = None, hosts: Sequence[str] = ()
) -> None:
    """Logs a fault and appends {time, fault, update, hosts, message} to the run directory's faults.jsonl.

    hosts: the hosts to blame; the next attempts avoid them. Never raises: the fault may be the disk.
    """
    logger.error("FAULT (%s): %s", kind, message)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": time, "fault": kind, "update": update, "hosts": list(hosts), "message": message}
    try:
        files.append_fault(entry)
    except OSError as error:
        logger.error("FAULT (log): %s cannot be written: %s", files.faults, error)
