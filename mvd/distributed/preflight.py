"""Checks before several processes start to train or test: unusable hosts are reported before anything is computed."""

import importlib.metadata
import logging
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mvd.config import ConfigError
from mvd.distributed.faults import HostFault, record_fault
from mvd.distributed.process import Process, gather
from mvd.distributed.watchdog import heartbeat
from mvd.host import hostname
from mvd.provenance import PACKAGES
from mvd.stage import Stage

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

MINUTES = 1.0  # timeout of the checks
CLOCK_SECONDS = 10.0  # allowed clock skew
FREE_SHARE = 0.5  # of a GPU's memory; if less is free, another process uses the GPU
MEGABYTES = {"cuda": 256, "cpu": 16}  # size of the all-reduce
SQUARE = {"cuda": 8192, "cpu": 384}  # side of the matrices that are multiplied
COPIED_MEGABYTES = 256  # from the host to a GPU
TRIES = 7  # measurements of a rate, of which the best counts: others may use the same host
CPU_TOLERANCE = 3.0  # faults.slow_factor is multiplied by it for CPUs, which processes share


class SampleCheck(NamedTuple):
    """The checks of the data.

    description: the list of samples, in a few words that must be the same on all hosts. read: reads some samples,
    other ones for each rank; raises RuntimeError or OSError if this host cannot.
    """

    description: str
    read: Callable[[int], None]


@dataclass
class Report:
    """What one process found out about its host.

    memory_gb: free memory of its device, in GB. bandwidth: of the all-reduce, in GB/s. clock: seconds since the epoch.
    facts: must be the same on all hosts. problems: one sentence each. rates: name with unit -> how fast it computes
    and copies.
    """

    host: str
    memory_gb: float
    bandwidth: float
    clock: float
    facts: tuple[str, ...]
    problems: list[str]
    rates: dict[str, float] = field(default_factory=dict)


def preflight(stage: Stage, process: Process, samples: SampleCheck) -> None:
    """Checks GPU, memory, all-reduce, list of samples, some of them, run directory, clock and packages on every host.

    A process that computes or copies much more slowly than the others is recorded as a fault; with `faults.avoid_slow`
    its host fails.

    Raises:
        HostFault: some hosts fail, and are recorded in faults.jsonl; on every process.
        ConfigError: all processes fail, so other hosts would not help, or there are none; on every process.
    """
    if process.world_size == 1:
        return
    heartbeat("checking the hosts", 0, minutes=MINUTES)
    started = time.monotonic()
    mine: list[str] = []
    memory = _check(mine, lambda: _memory(process.device)) or 0.0
    _check(mine, lambda: samples.read(process.rank))
    _check(mine, lambda: _write_test(stage, process.rank))
    bandwidth = _check(mine, lambda: all_reduce_bandwidth(process)) or 0.0
    rates = _check(mine, lambda: _rates(process.device)) or {}
    packages = tuple(f"{name} {_version(name)}" for name in PACKAGES)
    facts = (*packages, f"Python {platform.python_version()}", samples.description)
    dist.barrier()  # so that all clocks are read at the same time
    reports = gather(Report(hostname(), memory, bandwidth, time.time(), facts, mine, rates))
    _compare(reports)
    _name_slow(stage, process, reports)
    hosts = {report.host for report in reports}
    logger.info(
        f"preflight: {process.world_size} processes on {len(hosts)} host{'s' * (len(hosts) > 1)}, "
        f"{min(report.memory_gb for report in reports):.1f} GB of memory free, "
        f"all-reduce {min(report.bandwidth for report in reports):.2f} GB/s, {time.monotonic() - started:.1f} s"
    )
    _judge(stage, process, reports)


def _check(problems: list[str], check: Callable[[], Found]) -> Found | None:
    try:
        return check()
    except (OSError, RuntimeError) as error:
        problems.append(str(error).splitlines()[0])
        return None


def _memory(device: torch.device) -> float:
    """Free memory in GB, of the GPU or, without one, of the host."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    ones = torch.ones(1024, 1024, device=device)
    if (ones @ ones).sum().item() != 1024**3:
        raise RuntimeError(f"{device} gives wrong results")
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE_SHARE * total:
        raise RuntimeError(
            f"only {free / 1e9:.1f} of {total / 1e9:.1f} GB are free on {device}: another process uses it"
        )
    return free / 1e9


def _write_test(stage: Stage, rank: int) -> None:
    path = stage.directory / f".preflight-{rank}"
    try:
        with open(path, "wb") as handle:
            handle.write(bytes(4096))
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        path.unlink(missing_ok=True)


def all_reduce_bandwidth(process: Process) -> float:
    """Sums a tensor over all processes three times; returns the median bandwidth of what a process sends, in GB/s."""
    values = torch.ones(MEGABYTES[process.device.type] * 2**18, device=process.device)
    seconds, correct = [], True
    for _ in range(3):
        values.fill_(1.0)
        started = time.monotonic()
        dist.all_reduce(values)
        correct &= bool((values == process.world_size).all())  # waits for the GPU
        seconds.append(time.monotonic() - started)
    if not correct:
        raise RuntimeError("the all-reduce gave a wrong sum")
    sent = 2 * (process.world_size - 1) / process.world_size * values.numel() * 4
    return sent / statistics.median(seconds) / 1e9


def _rates(device: torch.device) -> dict[str, float]:
    """How fast this process multiplies matrices and, with a GPU, copies to it."""
    side = SQUARE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    square = torch.ones(side, side, dtype=dtype, device=device)
    rates = {"TFLOP/s of a matrix product": 2 * side**3 / 1e12 / _best_seconds(lambda: square @ square, device)}
    if device.type == "cuda":
        pinned = torch.empty(COPIED_MEGABYTES * 2**20, dtype=torch.uint8, pin_memory=True)
        seconds = _best_seconds(lambda: pinned.to(device, non_blocking=True), device)
        rates["GB/s from the host to its GPU"] = pinned.numel() / 1e9 / seconds
    return rates


def _best_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _name_slow(stage: Stage, process: Process, reports: list[Report]) -> None:
    """Records a fault for each process that is slower than the others, or adds it to its host's problems."""
    limits = stage.execution.faults
    if limits.slow_factor is None:
        return
    factor = limits.slow_factor * (CPU_TOLERANCE if process.device.type == "cpu" else 1.0)
    for name in reports[0].rates:
        rates = [report.rates.get(name, 0.0) for report in reports]
        usual = statistics.median_high(rates)
        for rank, (report, rate) in enumerate(zip(reports, rates, strict=True)):
            if rate and rate * factor < usual:
                text = f"rank {rank} is slow: {rate:.3g} {name}, where {usual:.3g} are usual"
                if limits.avoid_slow:
                    report.problems.append(text)
                elif process.is_first:
                    record_fault(stage.files, "slow", f"{report.host}: {text}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _compare(reports: list[Report]) -> None:
    """Adds to each report's problems what differs from the majority."""
    usual, _ = Counter(report.facts for report in reports).most_common(1)[0]
    middle = statistics.median(report.clock for report in reports)
    for report in reports:
        odd = [own for own, common in zip(report.facts, usual, strict=True) if own != common]
        if odd:
            report.problems.append(f"it has {', '.join(odd)}, unlike the others")
        if abs(report.clock - middle) > CLOCK_SECONDS:
            report.problems.append(f"its clock is {report.clock - middle:+.0f} s from the others'")


def _judge(stage: Stage, process: Process, reports: list[Report]) -> None:
    failing = {report.host: report.problems[0] for report in reports if report.problems}
    if not failing:
        return
    message = "; ".join(f"{host}: {problem}" for host, problem in sorted(failing.items()))
    is_alone = len({report.host for report in reports}) == 1 and "SLURM_JOB_ID" not in os.environ
    if is_alone or all(report.problems for report in reports):
        raise ConfigError(f"{stage.id}: no host passes the checks before the start: {message}; fix that first")
    if process.is_first:
        record_fault(stage.files, "preflight", message, hosts=sorted(failing))
    raise HostFault(f"{stage.id}: the checks before the start failed on {message}; start it again on other hosts")
