"""The host that a process runs on: its name, and the CPU cores that the process may use."""

import os
import socket


def hostname() -> str:
    """SLURM's name of this node in a SLURM job, so that a job can exclude it; else the system's host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def usable_cores() -> int:
    """CPU cores that this process has for itself, at least 1.

    The affinity mask decides. If it covers the whole allocation of the node, the processes of the node share it:
    SLURM does not bind tasks everywhere, and torchrun never does.
    """
    mask = len(os.sched_getaffinity(0))
    allocated = os.environ.get("SLURM_CPUS_ON_NODE") if "SLURM_STEP_ID" in os.environ else None
    if allocated is not None and mask < int(allocated):
        return mask  # bound by SLURM, which sets SLURM_CPUS_PER_TASK only if --cpus-per-task was given
    per_task = os.environ.get("SLURM_CPUS_PER_TASK") if allocated is not None else None
    share = int(per_task) if per_task else mask // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, mask))
