"""Logging of training and job processes: time, rank and level on every line."""

import logging
import os
import sys

PACKAGES = ("mvd", "launch")


def configure_logging(rank: int) -> None:
    """Sends the log of this process to stdout, and its warnings and errors to stderr.

    Rank 0 logs everything from INFO on; the others log warnings and errors only, or everything if the environment
    variable MVD_LOG_RANKS is "all". Safe to call again.
    """
    everything = rank == 0 or os.environ.get("MVD_LOG_RANKS") == "all"
    formatter = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    ordinary = logging.StreamHandler(sys.stdout)
    ordinary.addFilter(lambda record: record.levelno < logging.WARNING)
    urgent = logging.StreamHandler(sys.stderr)
    urgent.setLevel(logging.WARNING)
    for handler in (ordinary, urgent):
        handler.setFormatter(formatter)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO if everything else logging.WARNING)
        logger.propagate = False
        logger.handlers = [ordinary, urgent]
