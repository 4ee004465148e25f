"""The device of a process: one of the GPUs that it can see, or the CPU."""

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from mvd.config import ConfigError
from mvd.distributed.faults import HostFault
from mvd.host import hostname

EXPECT_GPU = "MVD_EXPECT_GPU"  # "1" in jobs that asked for GPUs: they never run on the CPU instead


def choose_device() -> torch.device:
    """The GPU of this process, which becomes its current one, or the CPU.

    Sets LOCAL_RANK to the index of the GPU, which is what DeepSpeed takes it for.

    Raises:
        HostFault: GPUs were asked for, and this process has none that works.
        ConfigError: GPUs were asked for, and PyTorch was built without support for them.
    """
    expected = os.environ.get(EXPECT_GPU) == "1"
    if expected and torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            f"this job asked for GPUs, but PyTorch {torch.__version__} is built without CUDA; install a CUDA build"
        )
    if not torch.cuda.is_available():
        if expected:
            raise HostFault(f"{hostname()}: this job asked for GPUs, but no GPU is usable ({_why_no_gpu()})")
        return torch.device("cpu")
    index = gpu_index(torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]))
    os.environ["LOCAL_RANK"] = str(index)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def gpu_index(visible: int, local_rank: int) -> int:
    """Which of the `visible` GPUs belongs to this process.

    SLURM may show each process only its own GPU (`--gpus-per-task`, `--gpu-bind`), which then has index 0.

    Raises:
        HostFault: the host has fewer GPUs than processes.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise HostFault(f"{hostname()}: only {visible} GPUs are visible, too few for local rank {local_rank}")
    return local_rank


def hardware(device: torch.device) -> str:
    """What decides about the last bits of a result: the GPU, or the CPU with the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@lru_cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _why_no_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    try:
        torch.cuda.current_device()
    except RuntimeError as error:
        return str(error).splitlines()[0].split(". ")[0]
    return "torch.cuda.is_available() is False"
