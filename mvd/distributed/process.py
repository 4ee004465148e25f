"""The processes of a run: starting them, agreeing on an outcome, and noticing that one is lost.

One code path for CPUs (gloo) and GPUs (NCCL).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mvd.config import ConfigError
from mvd.distributed.exit_codes import INVALID
from mvd.distributed.logs import configure_logging
from mvd.host import hostname

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # set before DeepSpeed looks for a GPU and warns
import deepspeed


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_processes() -> Process:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without these variables the process stays alone. The device is the local rank's GPU, else the CPU.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of about half a minute
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    process = Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    configure_logging(process.rank)
    return process


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def exit_together() -> Iterator[None]:
    """Exit on every rank if the block raises ConfigError on any rank, so that none waits for one that is gone.

    The lowest such rank raises its error, the others raise SystemExit(2): the message is printed once. Inside the
    block, do not run a collective after code that may raise on only some ranks.
    """
    error = None
    try:
        yield
    except ConfigError as caught:
        error = caught
    failed = [rank for rank, fails in enumerate(gather(error is not None)) if fails]
    if error is not None and failed[0] == dist.get_rank():
        raise error
    if failed:
        raise SystemExit(INVALID)


class PeerLost(RuntimeError):
    """Another process of the run, or a loader process of this one, is gone; the run can be started again."""


@contextmanager
def raise_peer_lost() -> Iterator[None]:
    """Turn the errors of collectives and loaders that mean a lost process into PeerLost, with a sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        who = f"rank {dist.get_rank()} on {hostname()}"
        if "DataLoader worker" in reason:
            raise PeerLost(f"{who} has lost a process that reads its data ({reason}); start the stage again") from error
        if isinstance(error, dist.DistError) or "gloo" in reason or "Connection" in reason:
            raise PeerLost(f"{who} has lost another process of the run ({reason}); start the stage again") from error
        raise


def mean_across_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
