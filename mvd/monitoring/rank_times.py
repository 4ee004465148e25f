"""How long each process takes for its own part of an update, and which is the slowest."""

import statistics
import time
from typing import NamedTuple

import torch

from mvd.distributed.faults import record_fault
from mvd.distributed.process import Process, gather, gather_numbers
from mvd.host import hostname
from mvd.stage import Stage

STRAGGLER = 1.2  # a slowest process is named in the progress line from this multiple of the median on
SLOW_REPORTS = 50  # reports in a row after which a slow process is a fault


class OwnTime(NamedTuple):
    """Seconds per update of a process: all of its own part, and those for which it waited for data."""

    all: float
    loading: float


class RankTimes:
    """Seconds from the start of an update until a process waits for the others' losses, between two reports.

    That is reading, decoding and the forward and backward passes before the last gradient is exchanged; afterwards all
    processes take the same time, but for what the next batch keeps a GPU waiting. On a GPU, events are recorded in its
    queue, which does not synchronise the host. All processes create it and call `report` together.

    A process that is slower than `faults.slow_factor` times the median in many reports in a row is recorded as a fault.
    The median is that of the faster half where the number of processes is even: a host may be half of them.
    """

    def __init__(self, stage: Stage, process: Process) -> None:
        self.files, self.limits, self.process = stage.files, stage.execution.faults, process
        self.hosts: list[str] = gather(hostname())
        on_gpu = process.device.type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self.started = self.seconds = self.loading = 0.0
        self.updates = 0
        self.slow_reports = [0] * process.world_size

    def start(self) -> None:
        """An update begins."""
        self.started = time.perf_counter()
        if self.events:
            self.events[0].record()

    def arrive(self) -> None:
        """This process's own part of the update is over, or queued."""
        self.started = time.perf_counter() - self.started
        if self.events:
            self.events[1].record()

    def add(self, loading: float, afterwards: float = 0.0) -> None:
        """Counts the update; the host must have read a result that was queued after `arrive`.

        loading: seconds for which it waited for data. afterwards: those of them after `arrive`.
        """
        self.updates += 1
        self.loading += loading
        self.seconds += self.events[0].elapsed_time(self.events[1]) / 1000 if self.events else self.started
        self.seconds += afterwards

    def report(self, update: int) -> dict[str, float]:
        """Per update, the median over the processes and the slowest, and its rank; {} after no update.

        The share of data is that of the slowest process's time in which it waited for data.
        """
        counted = max(self.updates, 1)
        own = OwnTime(self.seconds / counted, self.loading / counted)
        times = [OwnTime(*one) for one in gather_numbers(own, self.process)]
        counted, self.updates, self.seconds, self.loading = self.updates, 0, 0.0, 0.0
        if not counted:
            return {}
        self._note_slow(times, update)
        slowest = max(range(len(times)), key=lambda rank: times[rank].all)
        return {
            "speed/median_rank_seconds": statistics.median_low(own.all for own in times),
            "speed/slowest_rank_seconds": times[slowest].all,
            "speed/slowest_rank": slowest,
            "speed/slowest_rank_data_share": min(times[slowest].loading / (times[slowest].all or 1), 1.0),
        }

    def _note_slow(self, times: list[OwnTime], update: int) -> None:
        """Records a fault for a process that has been slow in the last reports, once in an attempt."""
        median = OwnTime(*(statistics.median_low(values) for values in zip(*times, strict=True)))
        for rank, own in enumerate(times):
            is_slow = self.limits.slow_factor is not None and own.all > self.limits.slow_factor * median.all
            self.slow_reports[rank] = self.slow_reports[rank] + 1 if is_slow else 0
            if self.slow_reports[rank] == SLOW_REPORTS and self.process.is_first:
                waits = own.loading - median.loading > (own.all - median.all) / 2
                message = (
                    f"rank {rank} on {self.hosts[rank]} is slow: {own.all:.3f} s an update where the median is "
                    f"{median.all:.3f} s, over {SLOW_REPORTS} reports, most of the difference in "
                    + ("waiting for its data" if waits else "its computing")
                )
                blamed = [self.hosts[rank]] if self.limits.avoid_slow else []
                record_fault(self.files, "slow", message, update, blamed)

    def straggler(self, report: dict[str, float]) -> str:
        """The slowest process of a report and its host, for the progress line; "" if it is not much slower."""
        median, slowest = report.get("speed/median_rank_seconds", 0.0), report.get("speed/slowest_rank_seconds", 0.0)
        if slowest <= STRAGGLER * median or len(self.hosts) == 1:
            return ""
        rank = int(report["speed/slowest_rank"])
        return f" (slowest: rank {rank} on {self.hosts[rank]}, {slowest:.2f} s, median {median:.2f} s)"

    def table(self) -> str:
        """Which host each rank is on, as Markdown."""
        return "| rank | host |\n|---|---|\n" + "\n".join(
            f"| {rank} | {host} |" for rank, host in enumerate(self.hosts)
        )
