"""How long each process takes for its own part of an update, and which is the slowest."""

import statistics
import time

import torch

from mvd.distributed.process import Process, gather
from mvd.host import hostname

STRAGGLER = 1.2  # a slowest process is named in the progress line from this multiple of the mean on


class RankTimes:
    """Seconds from the start of an update until a process waits for the others' losses, between two reports.

    That is reading, decoding and the forward and backward passes before the last gradient is exchanged; afterwards all
    processes take the same time. On a GPU, events are recorded in its queue, which does not synchronise the host. All
    processes create it and call `report` together.
    """

    def __init__(self, process: Process) -> None:
        self.hosts: list[str] = gather(hostname())
        on_gpu = process.device.type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self.started = self.seconds = 0.0
        self.updates = 0

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

    def add(self) -> None:
        """Counts the update; the host must have read a result that was queued after `arrive`."""
        self.updates += 1
        self.seconds += self.events[0].elapsed_time(self.events[1]) / 1000 if self.events else self.started

    def report(self) -> dict[str, float]:
        """Per update, the mean over the processes and the slowest, and its rank; {} after no update."""
        means: list[float] = gather(self.seconds / max(self.updates, 1))
        counted, self.updates, self.seconds = self.updates, 0, 0.0
        if not counted:
            return {}
        slowest = max(range(len(means)), key=means.__getitem__)
        return {
            "speed/mean_rank_seconds": statistics.fmean(means),
            "speed/slowest_rank_seconds": means[slowest],
            "speed/slowest_rank": slowest,
        }

    def straggler(self, report: dict[str, float]) -> str:
        """The slowest process of a report and its host, for the progress line; "" if it is not much slower."""
        mean, slowest = report.get("speed/mean_rank_seconds", 0.0), report.get("speed/slowest_rank_seconds", 0.0)
        if slowest <= STRAGGLER * mean or len(self.hosts) == 1:
            return ""
        rank = int(report["speed/slowest_rank"])
        return f" (slowest: rank {rank} on {self.hosts[rank]}, {slowest:.2f} s, mean {mean:.2f} s)"

    def table(self) -> str:
        """Which host each rank is on, as Markdown."""
        return "| rank | host |\n|---|---|\n" + "\n".join(
            f"| {rank} | {host} |" for rank, host in enumerate(self.hosts)
        )
