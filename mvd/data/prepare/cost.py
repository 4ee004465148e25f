"""How long the fine-tuning and the test of a row take, on GPUs and on this machine."""

import time

import numpy as np

from mvd.config import SIZES, Finetune, Test
from mvd.flops import gpu_hours, total_tflop
from mvd.host import count_gpus, usable_cores

GPU_TFLOPS = 100.0  # sustained per GPU, as the launcher assumes (cluster.sustained_tflops)
CPU_SHARE = {"tiny": 0.25}  # of a matrix product's speed; 0.5 for the other sizes
LONG = 2 * 3600  # seconds: beyond this, a warning


def describe_cost(finetune: Finetune, test: Test) -> str:
    """Sentences on the GPU-hours at GPU_TFLOPS and on the hours here; a warning if it takes long here without a GPU."""
    gpus = count_gpus()
    hours = gpu_hours(finetune, GPU_TFLOPS) + gpu_hours(test, GPU_TFLOPS)
    name = _network(finetune.size)
    text = f"{name}, {finetune.optimization.epochs} epochs and test: about {duration(3600 * hours)} of one GPU"
    if gpus:
        return f"{text}, {duration(3600 * hours / gpus)} on this machine's {gpus}"
    cores = usable_cores()
    seconds = (total_tflop(finetune) + total_tflop(test)) / cpu_tflops(finetune.size)
    here = f"{cores} CPU core{'s' if cores > 1 else ''}"
    text += f" (at {GPU_TFLOPS:g} TFLOP/s); about {duration(seconds)} on this machine ({here}, no GPU)"
    if seconds > LONG and finetune.size != "tiny":
        text += f"\nwarning: {name} takes about {duration(seconds)} on {here}; use a machine with a GPU, or run the "
        text += "same command with --size tiny for a row of the smallest network, to try everything out"
    return text


def cpu_tflops(size: str) -> float:
    """Sustained TFLOP/s of this process's CPU cores: a share, from measurements, of a plain fp32 matrix product's."""
    side = 1024
    matrix = np.ones((side, side), np.float32)
    times = []
    for _ in range(5):
        started = time.monotonic()
        matrix @ matrix
        times.append(time.monotonic() - started)
    return CPU_SHARE.get(size, 0.5) * 2 * side**3 / min(times) / 1e12


def duration(seconds: float) -> str:
    """For instance `40 s`, `25 min`, `3.5 h` or `12 days`."""
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = max(seconds / unit, 1)
            return f"{value:.0f} {name}"
    return f"{seconds / 86400:,.0f} days"


def _network(size: str) -> str:
    short = SIZES[size].short_name
    return f"ViT-{short[-1].upper()}" if short.startswith("vit") else f"the {size} network"
