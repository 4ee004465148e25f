"""What the errors of a run mean: a host's fault, a lost rank, too little GPU memory, or a bug."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mvd.batch import smallest_micro_batch
from mvd.config import ConfigError, ImageTeacher, Test
from mvd.distributed.blame import hardware_fault
from mvd.distributed.faults import HostFault, PeerLost, RunFailed, record_fault
from mvd.host import hostname
from mvd.memory import GB, USABLE, memory_of
from mvd.stage import Stage

_OUT_OF_MEMORY = re.compile(r"CUDA error: out of memory|Cuda failure.{0,10}out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_OTHER_PROCESS = re.compile(r"Process (\d+) has ([\d.]+ [KMG]iB) memory in use")


@contextmanager
def explain_errors(stage: Stage, *others: Stage) -> Iterator[None]:
    """Turns errors of CUDA, NCCL, gloo and the data loader into HostFault, PeerLost or ConfigError with one sentence.

    A hardware fault is recorded in faults.jsonl with this host. Anything else is raised as it is. others: further
    stages in the same job.

    Raises:
        HostFault: this host is at fault.
        PeerLost: another rank or a data loader process is gone.
        ConfigError: the GPU's memory is too small for the micro-batch.
    """
    try:
        yield
    except (RunFailed, HostFault, PeerLost):
        raise
    except RuntimeError as error:
        reason = _first_sentence(error)
        fault = _shared_gpu(error) or hardware_fault(error)
        if fault is not None:
            message = f"{_this_rank()}: {fault} ({reason})"
            for damaged in (stage, *others):
                record_fault(damaged.files, "hardware", message, hosts=[hostname()])
            raise HostFault(f"{message}; start the stage again on another host") from error
        if _is_out_of_memory(error):
            raise ConfigError(f"{stage.id}: {_this_rank()}: {_advice_on_memory(stage)} ({reason})") from error
        if "DataLoader worker" in reason or "Pin memory thread exited" in reason:  # the log has the thread's own error
            raise PeerLost(f"{_this_rank()} lost a data loader process ({reason}); start the stage again") from error
        if isinstance(error, dist.DistError) or "gloo" in reason or "Connection" in reason:
            raise PeerLost(f"{_this_rank()} lost another rank ({reason}); start the stage again") from error
        raise


def _this_rank() -> str:
    return f"rank {dist.get_rank()} on {hostname()}" if dist.is_initialized() else f"a process on {hostname()}"


def _first_sentence(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def _shared_gpu(error: RuntimeError) -> str | None:
    """Which other process holds memory of the GPU that ran out of it, as PyTorch lists them."""
    other = _OTHER_PROCESS.search(str(error))
    # In a container PyTorch may not recognize its own process, and then lists it as another one.
    if not (other and _is_out_of_memory(error) and "this process has" in str(error)):
        return None
    return f"process {other[1]}, not of this run, holds {other[2]} of the GPU's memory"


def _advice_on_memory(stage: Stage) -> str:
    """The setting that makes the stage fit."""
    running, recipe, how = stage.execution.micro_batch, stage.recipe, stage.execution
    smallest = 1 if isinstance(recipe, Test) else smallest_micro_batch(recipe)
    fitting = _fitting_micro_batch(stage)
    if fitting >= smallest:
        less = f"half of the present {running}" if fitting == running // 2 else f"less than the present {running}"
        return f"out of GPU memory; set cluster.{stage.kind}.micro_batch={fitting}, {less}"
    full = f"out of GPU memory with the smallest micro_batch, {running}"
    if isinstance(recipe, Test | ImageTeacher) or recipe.activation_checkpointing:
        return f"{full}; use GPUs with more memory, or ZeRO stage 3"
    counted = memory_of(recipe, how.world_size, how.deepspeed, how.precision).total(running)
    too_little = math.floor(10 * counted / USABLE / GB) / 10
    return f"{full}; set cluster.gpu_memory_gb={too_little:g}, with which activations are recomputed"


def _fitting_micro_batch(stage: Stage) -> int:
    """The most samples that fit this GPU by count (mvd.memory); half of the present ones if by count those fit."""
    how = stage.execution
    if isinstance(stage.recipe, Test) or not torch.cuda.is_available():
        return how.micro_batch // 2
    available = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GB
    counted = memory_of(stage.recipe, how.world_size, how.deepspeed, how.precision).most_samples(available)
    return counted if counted < how.micro_batch else how.micro_batch // 2
