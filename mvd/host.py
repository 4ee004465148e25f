"""The host that a process runs on: its name, its Python, and the CPU cores and GPUs that the process may use."""

import os
import shutil
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path


def hostname() -> str:
    """SLURM's name of this node in a SLURM job, so that a job can exclude it; else the system's host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def python_command() -> str:
    """This Python as it can be typed in the current folder: `python` if the shell finds this one under that name."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).parent.absolute() == executable.parent:
        return "python"
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


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


def count_gpus() -> int:
    """Number of NVIDIA GPUs visible to a process started here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def gpu_memory_gb() -> float | None:
    """Memory of this machine's smallest NVIDIA GPU in GB (10^9 bytes); None if nvidia-smi does not say."""
    sizes = [int(line) for line in _ask_gpus("memory.total") if line.isdigit()]  # in MiB
    return min(sizes) * 2**20 / 1e9 if sizes else None


def gpu_name() -> str | None:
    """Name of this machine's first NVIDIA GPU; None if no GPU is visible, or nvidia-smi does not say."""
    return next(iter(_ask_gpus("name")), None) if count_gpus() else None


@lru_cache
def _ask_gpus(field: str) -> tuple[str, ...]:
    """What nvidia-smi says about each GPU; nothing if it is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    return tuple(listed.stdout.splitlines()) if listed.returncode == 0 else ()
