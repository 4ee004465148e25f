"""Which errors and signals are a host's fault.

A hardware fault blames the host in faults.jsonl, so that the next attempt avoids it. A bug must not: it would take good
hosts away from the run, one attempt after the other. Must not import torch: a job's batch script uses it too.
"""

import re
import signal

# What NCCL says after "Last error" if a peer is to blame.
GONE = r"socket|connect|call to (recv|send)|timed out|no route|unreachable"

# Text of an error -> what is wrong with the host. The texts are those of cudaGetErrorString, PyTorch, the NVIDIA driver
# and NCCL. Left out on purpose, since bugs cause them: "device-side assert", "illegal memory access", "misaligned
# address", and a connection that a peer closed; with InfiniBand those are the completions of requests that the peer has
# not answered (status 12, for instance), and of those that were waiting then (5).
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
    r"NET/IB ?: Got completion [^\n]*status=([1-4]\b|IBV_WC_LOC_)": "InfiniBand error",
    rf"call to ibv_\w+ failed(?![^\n]*({GONE}))": "InfiniBand error",
    r"NET/IB ?: [^\n]*Got async [^\n]*(error|fatal)": "InfiniBand error",
    # The explanation that NCCL adds mentions sockets; only what follows "Last error" says whether a peer is to blame.
    rf"unhandled system error(?!.*Last error:.*({GONE}))": "system error in NCCL",
    r"killed by signal: Illegal instruction": "illegal instruction (SIGILL) in a data loader process",
    r"killed by signal: Bus error": "bus error (SIGBUS) in a data loader process: broken memory, or /dev/shm is full",
}
_HARDWARE = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), meaning) for pattern, meaning in HARDWARE.items()]
SIGNALS: dict[int, str] = {signal.SIGILL: "illegal instruction (SIGILL)", signal.SIGBUS: "bus error (SIGBUS)"}


def hardware_fault(error: BaseException | str) -> str | None:
    """What is wrong with the host on which this error, or the one that caused it, occurred; None if nothing is known.

    error: an exception, or text that a process printed before it died.
    """
    if isinstance(error, str):
        return next((meaning for pattern, meaning in _HARDWARE if pattern.search(error)), None)
    fault = hardware_fault(str(error)) if isinstance(error, RuntimeError) else None
    cause = error.__cause__ or error.__context__
    return fault or (hardware_fault(cause) if cause else None)
