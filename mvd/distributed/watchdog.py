"""Ends a hung run: blames the straggler, logs every Python stack and exits on all ranks with exit code 76.

Each rank publishes its current step to the TCPStore from a background thread. A rank that stays in one step for too
long, or whose heartbeat stops, ends the run.
"""

import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import record_fault
from mvd.distributed.process import Process
from mvd.host import hostname
from mvd.run_directory import RunDirectory

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
SECONDS_FOR_STACKS = 10.0  # for the other ranks to log theirs before the run ends
SECONDS_FOR_RECORDER = 5.0
# Steps of an update, in this order: the straggler is the rank that is furthest behind.
STEPS = (
    "starting",
    "reading videos",
    "in forward and backward",
    "waiting for the others' losses",
    "updating weights",
    "saving",
    "writing a checkpoint",
    "waiting for the others' checkpoint files",
)

_runs = itertools.count()
_current: "Watchdog | None" = None


def heartbeat(step: str, update: int | None = None, minutes: float | None = None) -> None:
    """Report progress to the watchdog, if there is one: this process is now in `step` of update `update`.

    Every call counts as progress. update: the update of the last heartbeat if left out. minutes: how long the step may
    take, if less than the profile's hang_minutes.
    """
    if _current is not None:
        _current.heartbeat(step, update, minutes)


def next_turn() -> None:
    """Says that a group's next student trains now: of two ranks, the one that has had more turns is ahead."""
    if _current is not None:
        _current.turn += 1


def background_heartbeat(step: str | None, update: int = 0) -> None:
    """As `heartbeat`, for the calling thread, which works beside the training; None: it has ended."""
    if _current is None:
        return
    if step is None:
        _current.background.pop(threading.get_ident(), None)
    else:
        _current.background[threading.get_ident()] = (step, update, time.monotonic())


class Seen(NamedTuple):
    """What a rank last published, and for how long it has published nothing new."""

    rank: int
    host: str
    step: str
    update: int
    seconds: float
    silent_seconds: float
    turn: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self.turn, self.update, STEPS.index(self.step) if self.step in STEPS else len(STEPS)


class Watchdog:
    """Context manager that watches this process and, through their heartbeats, the others.

    minutes: how long a rank may stay in one step. others: further run directories of the same run, for its faults.
    """

    def __init__(
        self, files: RunDirectory, process: Process, minutes: float, others: Sequence[RunDirectory] = ()
    ) -> None:
        self.files, self.others, self.process = files, others, process
        self.usual_limit = self.limit = 60 * minutes  # in seconds
        self.step, self.update, self.since = "starting", 0, time.monotonic()
        self.turn = 0
        self.background: dict[int, tuple[str, int, float]] = {}  # step, update and time of each thread beside it
        self.poll = min(POLL_SECONDS, self.usual_limit / 10)
        self.store = PrefixStore(f"watchdog-{next(_runs)}", _get_default_store().clone())
        self.published: dict[int, tuple[bytes, float]] = {}  # rank -> last heartbeat, first seen at
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

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

    def heartbeat(self, step: str, update: int | None, minutes: float | None = None) -> None:
        """See the function of that name."""
        self.limit = self.usual_limit if minutes is None else min(self.usual_limit, 60 * minutes)
        self.step, self.since = step, time.monotonic()
        self.update = self.update if update is None else update

    def _watch(self) -> None:
        for turn in itertools.count():
            if turn and self.leaving.wait(self.poll):  # the first heartbeat is published at once
                return
            faulthandler.dump_traceback_later(2 * self.usual_limit + 60, exit=True)  # if Python itself is blocked
            step, update, since = self._longest()
            stuck = time.monotonic() - self.since > self.limit or time.monotonic() - since > self.usual_limit
            try:
                self._publish(turn, step, update, since)
                everyone = self._read()
                if stuck or self._silent(everyone) or self.store.check(["fired"]):
                    self._end(everyone)
            except dist.DistError as error:  # rank 0 hosts the store
                if stuck:
                    self._leave_alone(str(error))

    def _longest(self) -> tuple[str, int, float]:
        """Step, update and start of what goes on for longest: the training or a thread beside it."""
        training = (self.step, self.update, self.since)
        return min([training, *self.background.copy().values()], key=lambda activity: activity[2])

    def _publish(self, turn: int, step: str, update: int, since: float) -> None:
        value = [hostname(), step, update, time.monotonic() - since, self.turn, turn]
        self.store.set(str(self.process.rank), json.dumps(value))

    def _read(self) -> list[Seen]:
        """The last heartbeat of every rank that has published one."""
        everyone = []
        now = time.monotonic()
        for rank in range(self.process.world_size):
            if not self.store.check([str(rank)]):
                continue
            value = self.store.get(str(rank))
            if self.published.get(rank, (b"", now))[0] != value:
                self.published[rank] = (value, now)
            host, step, update, seconds, turn, _ = json.loads(value)
            everyone.append(Seen(rank, host, step, update, seconds, now - self.published[rank][1], turn))
        return everyone

    def _silent(self, everyone: list[Seen]) -> list[Seen]:
        return [seen for seen in everyone if seen.silent_seconds > max(self.usual_limit / 3, 4 * self.poll)]

    def _end(self, everyone: list[Seen]) -> None:
        """Logs this rank's stacks and ends the process; the first rank to get here records the fault."""
        try:
            first = self.store.add("fired", 1) == 1
            self._log_state()
            self.store.add("stacks", 1)
            deadline = time.monotonic() + SECONDS_FOR_STACKS
            if first:
                silent = self._silent(everyone)
                expected = self.process.world_size - len(silent)
                while self.store.add("stacks", 0) < expected and time.monotonic() < deadline:
                    time.sleep(0.05)
                message, hosts = diagnose(everyone, silent)
                self._record(message, hosts)
                self.store.set("said", "")
            while not self.store.check(["said"]) and time.monotonic() < deadline + 1:
                time.sleep(0.05)
        finally:
            os._exit(RETRYABLE)

    def _leave_alone(self, error: str) -> None:
        self._log_state()
        host = os.environ["MASTER_ADDR"]
        message = f"rank 0 on {host} does not answer ({error.splitlines()[0]})"
        self._record(message, [host])
        os._exit(RETRYABLE)

    def _record(self, message: str, hosts: Sequence[str]) -> None:
        for files in (self.files, *self.others):
            record_fault(files, "hang", message, self.update, hosts)

    def _log_state(self) -> None:
        title = f"rank {self.process.rank} on {hostname()}, {self.step}, update {self.update}"
        logger.error("--- stacks of %s\n%s", title, stacks())
        # In a thread, since the recorder asks the GPU, which may be what hangs.
        recorder = threading.Thread(target=dump_flight_recorder, args=(self.files, self.process), daemon=True)
        recorder.start()
        recorder.join(SECONDS_FOR_RECORDER)


def diagnose(everyone: list[Seen], silent: list[Seen]) -> tuple[str, list[str]]:
    """Who holds the others up, in a sentence, and the hosts to blame; no hosts if all ranks are at the same place."""
    if silent:
        guilty = silent
        said = [
            f"rank {s.rank} on {s.host} has sent no heartbeat for {s.silent_seconds:.0f} s (it was {s.step})"
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


def stacks() -> str:
    """The Python stack of every other thread, the main thread's last."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is threading.main_thread())
    return "\n".join(
        f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threads
        if thread.ident in frames and thread is not threading.current_thread()
    )


def dump_flight_recorder(files: RunDirectory, process: Process) -> None:
    """Writes PyTorch's record of this rank's last collectives, if this PyTorch keeps one, for `torchfrtrace`."""
    name = "_dump_nccl_trace" if process.device.type == "cuda" else "_dump_fr_trace"
    dump: Callable[[], bytes] | None = getattr(_distributed_c10d, name, None)
    if dump is None:
        return
    try:
        files.flight_recorder.mkdir(exist_ok=True)
        (files.flight_recorder / f"rank_{process.rank}").write_bytes(dump())
    except (OSError, RuntimeError) as error:
        logger.warning("the flight recorder cannot be written: %s", error)
