"""Ends a hung run: names the straggler, dumps every Python stack and exits on all ranks with exit code 76.

Each rank publishes its current step to the TCPStore from a background thread. A rank that stays in one step for too
long, or whose heartbeat stops, ends the run.
"""

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
import traceback
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import record_fault
from mvd.distributed.process import Process
from mvd.host import hostname
from mvd.run_directory import RunDirectory

POLL_SECONDS = 5.0
SECONDS_FOR_STACKS = 10.0  # that the others get to print theirs before the run ends
# What a process does in an update, in this order; who hangs is the one that is behind.
STEPS = ("starting", "reading videos", "in forward and backward", "waiting for the others' losses", "updating weights")

_runs = itertools.count()
_current: "Watchdog | None" = None


def heartbeat(step: str, update: int, minutes: float | None = None) -> None:
    """Report progress to the watchdog, if there is one: this process is now in `step` of update `update`.

    Every call counts as progress. minutes: how long the step may take, if less than the profile's hang_minutes.
    """
    if _current is not None:
        _current.heartbeat(step, update, minutes)


class Seen(NamedTuple):
    """What a process last published, and how long ago this one first saw that."""

    rank: int
    host: str
    step: str
    update: int
    seconds: float
    silent_seconds: float

    @property
    def place(self) -> tuple[int, int]:
        return self.update, STEPS.index(self.step) if self.step in STEPS else len(STEPS)


class Watchdog:
    """Watches this process and, through what they publish, the others, while it is entered."""

    def __init__(self, files: RunDirectory, process: Process, minutes: float) -> None:
        self.files, self.process = files, process
        self.usual_limit = self.limit = 60 * minutes
        self.poll = min(POLL_SECONDS, self.usual_limit / 10)
        self.store = dist.PrefixStore(f"watchdog-{next(_runs)}", _get_default_store().clone())
        self.published: dict[int, tuple[bytes, float]] = {}  # by rank: the last, and when it was new
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.heartbeat("starting", 0)

    def __enter__(self) -> "Watchdog":
        global _current
        _current = self
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self.leaving.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def heartbeat(self, step: str, update: int, minutes: float | None = None) -> None:
        """See the function of that name."""
        self.limit = self.usual_limit if minutes is None else min(self.usual_limit, 60 * minutes)
        self.step, self.update, self.since = step, update, time.monotonic()

    def _watch(self) -> None:
        for turn in itertools.count():
            if turn and self.leaving.wait(self.poll):  # the others are to know of this one from the start
                return
            faulthandler.dump_traceback_later(2 * self.usual_limit + 60, exit=True)  # if Python itself is blocked
            stuck = time.monotonic() - self.since > self.limit
            try:
                self._publish(turn)
                everyone = self._read()
                if stuck or self._silent(everyone) or self.store.check(["fired"]):
                    self._end(everyone)
            except dist.DistError as error:  # the store is in the first process
                if stuck:
                    self._leave_alone(str(error))

    def _publish(self, turn: int) -> None:
        value = [hostname(), self.step, self.update, time.monotonic() - self.since, turn]
        self.store.set(str(self.process.rank), json.dumps(value))

    def _read(self) -> list[Seen]:
        """What every process published; nothing of those that have not begun to."""
        everyone = []
        now = time.monotonic()
        for rank in range(self.process.world_size):
            if not self.store.check([str(rank)]):
                continue
            value = self.store.get(str(rank))
            if self.published.get(rank, (b"", now))[0] != value:
                self.published[rank] = (value, now)
            host, step, update, seconds, _ = json.loads(value)
            everyone.append(Seen(rank, host, step, update, seconds, now - self.published[rank][1]))
        return everyone

    def _silent(self, everyone: list[Seen]) -> list[Seen]:
        return [seen for seen in everyone if seen.silent_seconds > max(self.usual_limit / 3, 4 * self.poll)]

    def _end(self, everyone: list[Seen]) -> None:
        """Prints this process's stacks; the first one to come here says what happened; all leave."""
        try:
            first = self.store.add("fired", 1) == 1
            print_stacks(f"rank {self.process.rank} on {hostname()}, {self.step}, update {self.update}")
            self.store.add("stacks", 1)
            deadline = time.monotonic() + SECONDS_FOR_STACKS
            if first:
                silent = self._silent(everyone)
                expected = self.process.world_size - len(silent)
                while self.store.add("stacks", 0) < expected and time.monotonic() < deadline:
                    time.sleep(0.05)
                message, hosts = diagnose(everyone, silent)
                record_fault(self.files, "hang", message, self.update, hosts)
                self.store.set("said", "")
            while not self.store.check(["said"]) and time.monotonic() < deadline + 1:
                time.sleep(0.05)
        finally:
            os._exit(RETRYABLE)

    def _leave_alone(self, error: str) -> None:
        print_stacks(f"rank {self.process.rank} on {hostname()}, {self.step}, update {self.update}")
        host = os.environ["MASTER_ADDR"]
        message = f"the first process, on {host}, does not answer ({error.splitlines()[0]})"
        record_fault(self.files, "hang", message, self.update, [host])
        os._exit(RETRYABLE)


def diagnose(everyone: list[Seen], silent: list[Seen]) -> tuple[str, list[str]]:
    """Who holds the others up, in a sentence, and the hosts to blame; none where all are at the same place."""
    if silent:
        guilty = silent
        said = [
            f"rank {s.rank} on {s.host} has not been heard of for {s.silent_seconds:.0f} s (it was {s.step})"
            for s in silent
        ]
    else:
        longest = max(seen.seconds for seen in everyone)
        held = [seen for seen in everyone if seen.seconds > longest / 2]
        guilty = [seen for seen in held if seen.place == min(other.place for other in held)]
        said = [
            f"rank {s.rank} on {s.host} has been {s.step} for {s.seconds:.0f} s at update {s.update}" for s in guilty
        ]
    if len(guilty) == len(everyone) > 1:
        first = guilty[0]
        return f"all processes have been {first.step} for {first.seconds:.0f} s at update {first.update}", []
    return "; ".join(said), sorted({seen.host for seen in guilty})


def print_stacks(title: str) -> None:
    """Every thread's Python stack on stderr, in one piece, the main thread's last."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is threading.main_thread())
    parts = [f"--- stacks of {title}"]
    for thread in threads:
        if thread.ident in frames and thread is not threading.current_thread():
            parts.append(f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])))
    print("\n".join(parts), file=sys.stderr, flush=True)
