"""Stops a run whose directory another attempt has taken over, before it writes to it."""

import torch.distributed as dist

from mvd.config import ConfigError
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import gather
from mvd.owner import lost_to
from mvd.run_directory import RunDirectory


def check_owner(files: RunDirectory) -> None:
    """Called by all processes together: at the start, before each save and before the result.

    Raises:
        RunFailed: another attempt owns the run directory; raised on every process.
    """
    lost = gather(_lost_to(files) if dist.get_rank() == 0 else None)[0]
    if lost is not None:
        raise RunFailed(lost)


def _lost_to(files: RunDirectory) -> str | None:
    try:
        return lost_to(files)
    except ConfigError as error:
        return str(error)
    except OSError:  # a disk that does not answer is no other attempt; the save reports it
        return None
