"""The processes of a run: starting them, collecting values from all of them, and leaving together.

One code path for CPUs (gloo) and GPUs (NCCL).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mvd.config import ConfigError, Faults
from mvd.distributed.device import choose_device
from mvd.distributed.exit_codes import INVALID
from mvd.distributed.faults import HostFault, record_fault
from mvd.distributed.logs import configure_logging
from mvd.distributed.rendezvous import rendezvous
from mvd.host import hostname
from mvd.run_directory import RunDirectory

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # set before DeepSpeed looks for a GPU and warns
import deepspeed


@dataclass(frozen=True)
class Process:
    """This process among those that train together.

    hosts_checked: whether preflight is behind it, as after a rollback.
    """

    rank: int
    world_size: int
    device: torch.device
    hosts_checked: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_processes(files: RunDirectory | None = None, limits: Faults | None = None) -> Process:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without these variables the process is the only one. files: the run directory, for faults of the start.

    Raises:
        HostFault: this host has no usable GPU, although the job asked for GPUs, or another host did not arrive.
        PeerLost, Interrupted: see mvd.distributed.rendezvous.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    configure_logging(rank)
    try:
        device = choose_device()
    except HostFault as error:
        if files is not None:
            record_fault(files, "hardware", str(error), hosts=[hostname()])
        raise
    if not dist.is_initialized():
        _join(rank, world_size, device, files, limits or Faults())
    return Process(dist.get_rank(), dist.get_world_size(), device)


def _join(rank: int, world_size: int, device: torch.device, files: RunDirectory | None, limits: Faults) -> None:
    """Makes the process group, by way of which DeepSpeed communicates too."""
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of about half a minute
    timeout = group_timeout(limits.hang_minutes)
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{timeout.total_seconds():.0f}")
    # DeepSpeed makes more groups and gives no timeout: these are the defaults, 10 minutes for NCCL.
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    store = rendezvous(rank, world_size, limits.rendezvous_minutes, files)
    backend = "gloo" if device.type == "cpu" else "nccl"
    bound = device if device.type == "cuda" and world_size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=bound)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def group_timeout(hang_minutes: float) -> timedelta:
    """Timeout of collectives: never before the watchdog has said which process hangs.

    The watchdog acts after hang_minutes in one step, or a third of that without a heartbeat, and ends a process whose
    Python is blocked after twice hang_minutes and a minute.
    """
    return timedelta(minutes=2 * hang_minutes + 5)


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(numbers: Sequence[float], process: Process) -> list[list[float]]:
    """As `gather`, of as many numbers on each rank, in one message; `gather` takes two."""
    own = torch.tensor(numbers, dtype=torch.float64, device=process.device)
    everyones = own.new_empty(process.world_size * len(own))
    dist.all_gather_into_tensor(everyones, own)
    return everyones.view(process.world_size, len(own)).tolist()


def pass_on(value: Any, process: Process) -> Any:
    """Sends a value to the rank before this one, in a ring; returns that of the rank after. At least two ranks."""
    received: list[Any] = [None]
    before, after = (process.rank - 1) % process.world_size, (process.rank + 1) % process.world_size
    if process.rank % 2 == 0:  # so that each sender has a receiver
        dist.send_object_list([on_host(value)], before)
    dist.recv_object_list(received, after)
    if process.rank % 2 == 1:
        dist.send_object_list([on_host(value)], before)
    return received[0]


def share(value: Any, source: int) -> Any:
    """The value of one rank, on all of them."""
    shared = [on_host(value) if dist.get_rank() == source else None]
    dist.broadcast_object_list(shared, source)
    return shared[0]


def on_host(value: Any) -> Any:
    """A dictionary with its tensors on the CPU, where another process can receive them."""
    return {name: part.cpu() if isinstance(part, torch.Tensor) else part for name, part in value.items()}


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


class PendingMean:
    """The mean of a tensor over all ranks. On a GPU, neither the host nor the other work of the GPU waits for it.

    values: are overwritten.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.copied: torch.cuda.Event | None = None
        self.work = dist.all_reduce(values, async_op=values.is_cuda) if dist.get_world_size() > 1 else None

    def start_copy(self) -> None:
        """Queues the copy to the host; the work that is queued afterwards waits for the other ranks."""
        if self.work is not None:
            self.work.wait()
        if self.values.is_cuda:
            self.copied = torch.cuda.Event()
        self.values = self.values.to("cpu", non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def read(self) -> list[float]:
        """The mean; on a GPU, the host waits for what was queued before `start_copy`."""
        if self.copied is not None:
            self.copied.synchronize()
        means: list[float] = (self.values / dist.get_world_size()).tolist()
        return means
