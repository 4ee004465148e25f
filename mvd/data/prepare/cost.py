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
    """The time on one GPU at GPU_TFLOPS and on this machine; a warning if it is long here, without a GPU."""
    gpus, cores, name = count_gpus(), usable_cores(), _network(finetune.size)
    hours = gpu_hours(finetune, GPU_TFLOPS) + gpu_hours(test, GPU_TFLOPS)
    text = f"{name}, {finetune.optimization.epochs} epochs and test, without decoding: about "
    if gpus:
        return f"{text}{duration(3600 * hours / gpus)} on this machine's {gpus} GPUs at {GPU_TFLOPS:g} TFLOP/s each"
    seconds = (total_tflop(finetune) + total_tflop(test)) / cpu_tflops(finetune.size)
    if finetune.size == "tiny":
        return f"{text}{duration(seconds)} on this machine's CPU"
    text += f"{duration(3600 * hours)} on a GPU at {GPU_TFLOPS:g} TFLOP/s, {duration(seconds)} on this machine's CPU"
    if seconds > LONG:
        text += (
            f"\nwarning: {name} takes about {duration(seconds)} on {cores} CPU cores; use a machine with a GPU or, to "
            "try everything out, run the same command with --size tiny, which adds a row of the smallest network"
        )
    return text


def cpu_tflops(size: str) -> float:
    """Sustained TFLOP/s of this process's cores if they are idle: a share, from runs, of a plain fp32 matrix product's.

    Measured in CPU time, so that other processes do not count.
    """
    side = 1024
    matrix = np.ones((side, side), np.float32)
    times = []
    for _ in range(5):
        started = time.process_time()
        matrix @ matrix
        times.append(time.process_time() - started)
    return CPU_SHARE.get(size, 0.5) * usable_cores() * 2 * side**3 / min(times) / 1e12


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
