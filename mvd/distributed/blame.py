"""Which errors are a host's fault, and what the errors of a run mean.

A hardware fault blames the host in faults.jsonl, so that the next attempt avoids it. A bug never does: it would take
good hosts away from the run, one attempt after the other.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mvd.config import ConfigError
from mvd.distributed.faults import HostFault, PeerLost, RunFailed, record_fault
from mvd.host import hostname
from mvd.stage import Stage

# Text of an error -> what is wrong with the host. The texts are those of cudaGetErrorString, PyTorch, the NVIDIA driver
# and NCCL. Left out on purpose, since bugs cause them: "device-side assert", "illegal memory access", "misaligned
# address", and a connection that a peer closed.
HARDWARE = {
    r"uncorrectable ECC|\becc error": "uncorrectable ECC error of a GPU's memory",
    r"uncorrectable NVLink|over nvlink or a hardware error": "NVLink error",
    r"\bXid\b": "error of the NVIDIA driver (Xid)",
    r"GPU is lost|fallen off the bus|unable to determine the device handle": "a GPU has fallen off the bus",
    r"hardware stack error": "GPU hardware error",
    r"an illegal instruction was encountered|invalid program counter": "illegal instruction on a GPU",
    r"unspecified launch failure": "a GPU kernel failed without a reason",
    r"no CUDA-capable device|no CUDA GPUs are available|found no NVIDIA driver": "no usable GPU",
    r"CUDA-capable device\(s\) is/are busy or unavailable": "a GPU is busy or unavailable",
    r"CUDA unknown error|CUDA error: unknown error|CUDA driver initialization failed": "CUDA cannot be initialized",
    r"system not yet initialized": "the NVSwitch fabric manager is not running",
    r"unsupported display driver|CUDA driver version is insufficient": "the NVIDIA driver does not fit CUDA",
    r"Duplicate GPU detected": "several processes see only one GPU",
    r"NET/IB ?: Got (completion|async)|call to ibv_\w+ failed|IBV_WC_\w+_ERR": "InfiniBand error",
    # The explanation that NCCL adds mentions sockets; only what follows "Last error" says whether a peer is to blame.
    r"unhandled system error(?!.*Last error:.*(socket|connect|call to (recv|send)))": "system error in NCCL",
    r"killed by signal: Illegal instruction": "illegal instruction (SIGILL) in a data loader process",
    r"killed by signal: Bus error": "bus error (SIGBUS) in a data loader process",
}
_HARDWARE = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), meaning) for pattern, meaning in HARDWARE.items()]
_OUT_OF_MEMORY = re.compile(r"CUDA error: out of memory|Cuda failure.{0,10}out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_OTHER_PROCESS = re.compile(r"Process (\d+) has ([\d.]+ [KMG]iB) memory in use")
SIGNALS = {signal.SIGILL: "illegal instruction (SIGILL)", signal.SIGBUS: "bus error (SIGBUS)"}


def hardware_fault(error: BaseException | str) -> str | None:
    """What is wrong with the host that this error, or the error it follows from, occurred on; None if it is not at fault.

    error: an exception, or text that a process printed before it died.
    """
    if isinstance(error, str):
        return next((meaning for pattern, meaning in _HARDWARE if pattern.search(error)), None)
    while error is not None:
        if isinstance(error, RuntimeError) and (fault := hardware_fault(str(error))):
            return fault
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def explain_errors(stage: Stage) -> Iterator[None]:
    """Turns errors of CUDA, NCCL, gloo and the data loader into HostFault, PeerLost or ConfigError with one sentence.

    A hardware fault is recorded in faults.jsonl with this host. Anything else is raised as it is.

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
            record_fault(stage.files, "hardware", message, hosts=[hostname()])
            raise HostFault(f"{message}; start the stage again on another host") from error
        if _is_out_of_memory(error):
            raise ConfigError(f"{stage.id}: {_this_rank()}: {_advice_on_memory(stage)} ({reason})") from error
        if "DataLoader worker" in reason:
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
    """How to make the stage fit: half its micro-batch, if that is possible."""
    running = stage.execution.micro_batch
    smallest = 2 if stage.kind == "finetune" else 1  # fine-tuning mixes pairs of videos
    if running // 2 < smallest:
        return f"out of GPU memory with the smallest micro_batch, {running}; use GPUs with more memory, or ZeRO stage 3"
    return f"out of GPU memory; set cluster.{stage.kind}.micro_batch={running // 2}, half of the present {running}"
