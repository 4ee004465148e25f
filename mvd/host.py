"""The name of the machine that a process runs on."""

import os
import socket


def hostname() -> str:
    """In a SLURM job the name that SLURM knows this machine by, so that a job can avoid it; else the system's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
