"""The start of a process group: who arrived, and which host is missing."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mvd.distributed.faults import HostFault, PeerLost, record_fault
from mvd.distributed.signals import Interrupted, stop_requested
from mvd.host import hostname
from mvd.run_directory import RunDirectory

HOSTS = "MVD_HOSTS"  # the hosts of the job, comma-separated, by the names that mvd.host.hostname gives
POLL_SECONDS = 0.5
# What tells one start of a run from another: a store that happens to have the same address must not mix them up.
START = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MVD_OWNER", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def rendezvous(rank: int, world_size: int, minutes: float, files: RunDirectory | None) -> Store:
    """Waits until every rank has arrived; returns the store at MASTER_ADDR and MASTER_PORT, for the process group.

    minutes: how long rank 0 waits; the others wait half as long again. files: the run directory; a rank that does not
    arrive is recorded in its faults.jsonl.

    Raises:
        HostFault: some ranks did not arrive in time.
        PeerLost: the port is taken, or the first rank is gone again.
        Interrupted: a signal asked this process to stop.
    """
    if rank:  # rank 0 sees who is missing; a host that is cut off must not blame rank 0 before that
        minutes *= 1.5
    deadline = time.monotonic() + 60 * minutes
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    if not hosts_store and not _wait(lambda: _listens(address, port), deadline):
        host = next(iter(_hosts_of_job()), address)
        message = f"rank 0 on {host} did not open port {port} within {minutes:g} min"
        _fail(message, [host], files, is_first=True)
    try:
        store = PrefixStore("/".join(os.environ.get(name, "") for name in START), _connect(hosts_store, world_size))
        store.set(f"host of {rank}", hostname())
        if not _wait(lambda: store.check([f"host of {other}" for other in range(world_size)]), deadline):
            arrived = {other: _read(store, other) for other in range(world_size) if store.check([f"host of {other}"])}
            message, hosts = diagnose(arrived, world_size, _hosts_of_job())
            is_first = store.add("timeouts", 1) == 1
            _fail(f"{message} within {minutes:g} min", hosts, files, is_first)
    except dist.DistError as error:
        where = f"rank {rank} on {hostname()} cannot join the run at {address}:{port}"
        if "EADDRINUSE" in str(error):
            raise PeerLost(f"{where}: the port is taken; set another MASTER_PORT, or start again") from error
        raise PeerLost(f"{where} ({str(error).splitlines()[0].split('. ')[0]}); start again") from error
    return store


def diagnose(arrived: dict[int, str], world_size: int, hosts: Sequence[str]) -> tuple[str, list[str]]:
    """Who is missing, in a sentence, and the hosts to blame.

    arrived: rank -> host. hosts: all hosts of the job, each with the same number of ranks; empty if not known.
    """
    missing = [rank for rank in range(world_size) if rank not in arrived]
    present = list(arrived.values())
    blamed = [host for host in hosts if present.count(host) < world_size // len(hosts)]
    where = f" on {', '.join(blamed)}" if blamed else ""
    there = ", ".join(f"{host} ({present.count(host)})" for host in dict.fromkeys(present))
    ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}{where}"
    return f"{ranks} did not arrive (ranks that arrived: {there})", blamed


def _hosts_of_job() -> list[str]:
    return [host for host in os.environ.get(HOSTS, "").split(",") if host]


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    """Whether the condition came true before the deadline."""
    while not condition():
        if stop_requested():
            raise Interrupted("stopped by a signal while waiting for the other processes", 0)
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def _connect(hosts_store: bool, world_size: int) -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(minutes=1)
    return TCPStore(address, port, world_size, hosts_store, timeout, wait_for_workers=False, multi_tenant=True)


def _read(store: Store, rank: int) -> str:
    return store.get(f"host of {rank}").decode()


def _fail(message: str, hosts: list[str], files: RunDirectory | None, is_first: bool) -> NoReturn:
    if files is not None and is_first:
        record_fault(files, "rendezvous", message, hosts=hosts)
    raise HostFault(f"{message}; start the stage again, without that host if possible")
