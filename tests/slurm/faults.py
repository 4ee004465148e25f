"""The faults of the storm on SLURM. Those of `ENDINGS` end an attempt, those of `BETWEEN` come between two attempts."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from mvd.monitoring.rank_times import SLOW_REPORTS
from mvd.owner import read_owner
from mvd.run_directory import RunDirectory
from tests.slurm.conftest import Site
from tests.slurm.lab import Lab, wait_for
from tests.slurm.lab.quirks import clients_failing, controller_down, disk_full, port_taken

SECONDS_WITHOUT_CONTROLLER = 40
SECONDS_AFTER_THE_END = 10  # of the processes, for which a command of SLURM fails or the disk is full
HARDWARE_ERROR = "CUDA error: uncorrectable ECC error encountered"
HIDING = {"SQUEUE_STATES": "COMPLETED", "SQUEUE_PARTITION": "high"}  # hides a user's own job from squeue

MOST_UPDATES = 8  # of an attempt before its fault comes, and those until weights are compared
REPLICAS, AUDITS, SLOW = ("replicas",), ("audit", "recomputed"), ("slow",)  # in faults.jsonl
# What job.json says of the end of an attempt.
STOPPED = "stopped before a time limit"
KILLED = "a process ended with exit code"
LOST = None  # nothing: SLURM requeues the job itself and ends its batch script, or the disk is full


@dataclass(frozen=True)
class Victim:
    """A running attempt, and the node and the rank that a fault comes to if it does not come to all of them."""

    lab: Lab
    site: Site
    files: RunDirectory
    job: str
    tasks: dict[int, int]  # rank -> process id
    host_of: dict[int, str]  # rank -> node
    node: str
    rank: int

    @property
    def hosts(self) -> set[str]:
        """The nodes of the processes."""
        return set(self.host_of.values())

    def tell(self, name: str) -> None:
        """Send a signal to all processes, as a person does."""
        self.lab.run("scancel", f"--signal={name}", self.job)


Strike = Callable[[Victim], AbstractContextManager[None]]


class After(Enum):
    """The allocation of the next attempt."""

    SAME = "the same"
    SPARE = "the same, if it has enough nodes that are not to blame"
    NEW = "another one, since SLURM or a person has asked for it"


class Ending(NamedTuple):
    """A fault that ends an attempt.

    said: what job.json may say of it. strike: a context manager that lets the fault come, and undoes at its exit what
    would outlast the attempt. moment: "rendezvous" or "training" if the fault can come only then. after: whether the
    processes must start again in the same allocation. names: the kinds of fault one of which faults.jsonl must have of
    the rank's host, and none of another. avoids: whether that host must be avoided afterwards. takes: whether the fault
    takes a node away, which may be named too. updates: how many must be left in the run, for the fault to be found.
    """

    said: tuple[str | None, ...]
    strike: Strike
    moment: str = "any"
    after: After = After.NEW
    names: Collection[str] = ()
    avoids: bool = False
    takes: bool = False
    updates: int = 0


def _at_once(action: Callable[[Victim], object]) -> Strike:
    """A fault that leaves nothing to undo."""

    @contextmanager
    def strike(victim: Victim) -> Iterator[None]:
        action(victim)
        yield

    return strike


def _kill(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the first one's death may end it
            os.kill(pid, number)


@contextmanager
def _node_set_down(victim: Victim) -> Iterator[None]:
    victim.lab.run("scontrol", "update", f"nodename={victim.node}", "state=down", "reason=storm")
    yield
    wait_for("the nodes", victim.lab.nodes_ready)


@contextmanager
def _crashed_node(victim: Victim) -> Iterator[None]:
    victim.lab.crash(victim.node)
    yield
    victim.lab.restart(victim.node)
    wait_for("the nodes", victim.lab.nodes_ready)


def _preempt(victim: Victim) -> None:
    options = ("-p", "high", "--exclusive", "-w", victim.node, "-o", "/dev/null")
    victim.lab.run("sbatch", *options, "--wrap", "sleep 1")


@contextmanager
def _time_limit(victim: Victim) -> Iterator[None]:
    victim.lab.run("scontrol", "update", f"JobId={victim.job}", "TimeLimit=1")
    yield
    victim.lab.run("scontrol", "update", f"JobId={victim.job}", "TimeLimit=60", check=False)  # it may be over


@contextmanager
def _controller_restarted(victim: Victim) -> Iterator[None]:
    with controller_down(victim.lab):
        _kill(victim.tasks.values(), signal.SIGUSR2)  # scancel would not work
        time.sleep(SECONDS_WITHOUT_CONTROLLER)
    wait_for("the nodes", victim.lab.nodes_ready)
    yield


def _client_failing(name: str) -> Strike:
    def act(victim: Victim) -> None:
        with clients_failing(victim.site.clients, name):
            victim.tell("USR2")
            wait_for("the end of the processes", lambda: not victim.lab.tasks(victim.job), seconds=120)
            time.sleep(SECONDS_AFTER_THE_END)

    return _at_once(act)


@contextmanager
def _disk_full_at_the_end(victim: Victim) -> Iterator[None]:
    with disk_full(victim.site.runs):
        victim.tell("USR2")
        wait_for("the end of the processes", lambda: not victim.lab.tasks(victim.job), seconds=300)
        time.sleep(SECONDS_AFTER_THE_END)  # not for longer: their job may wait for the disk
    yield


@contextmanager
def _port_taken(victim: Victim) -> Iterator[None]:
    owner = read_owner(victim.files)
    assert owner is not None
    with port_taken(owner.port):
        yield


@contextmanager
def _hardware_error(victim: Victim) -> Iterator[None]:
    error = victim.site.brake.with_suffix(".error")
    error.write_text(HARDWARE_ERROR)
    yield
    error.unlink()


def _silent(wrong: str, kinds: Collection[str]) -> Strike:
    """The rank computes wrongly or slowly, and raises no error; once faults.jsonl has it, another process is killed."""

    @contextmanager
    def strike(victim: Victim) -> Iterator[None]:
        def found() -> bool:
            return any(fault["fault"] in kinds for fault in victim.files.read_faults()[known:])

        known, silent = len(victim.files.read_faults()), victim.site.brake.with_suffix(".silent")
        if wrong == "matmul":
            victim.site.wrong.write_text(json.dumps({"host": victim.host_of[victim.rank], "from": 1}))
        silent.write_text(wrong)
        victim.site.wait(f"the fault of the {wrong}", lambda: found() or victim.files.result.exists())
        assert found(), f"the run is complete, and the fault of the {wrong} was not found"
        silent.unlink()
        _kill([next(pid for rank, pid in victim.tasks.items() if rank != victim.rank)])
        yield
        victim.site.wrong.unlink(missing_ok=True)

    return strike


def _wrong_numbers(wrong: str, kinds: Collection[str], said: tuple[str | None, ...]) -> Ending:
    """A silent fault after which the rank's host is avoided."""
    strike = _silent(wrong, kinds)
    return Ending(said, strike, "training", After.SPARE, names=kinds, avoids=True, updates=MOST_UPDATES)


ENDINGS = {
    "USR2": Ending((STOPPED,), _at_once(lambda victim: victim.tell("USR2"))),
    "TERM": Ending((STOPPED,), _at_once(lambda victim: victim.tell("TERM"))),
    "kill one": Ending((KILLED,), _at_once(lambda victim: _kill([victim.tasks[victim.rank]])), after=After.SAME),
    "kill all": Ending((KILLED,), _at_once(lambda victim: _kill(victim.tasks.values())), after=After.SAME),
    "kill srun": Ending((KILLED,), _at_once(lambda victim: _kill(victim.lab.launchers(victim.job))), after=After.SAME),
    "scontrol requeue": Ending((LOST,), _at_once(lambda victim: victim.lab.run("scontrol", "requeue", victim.job))),
    "node set down": Ending((LOST, KILLED), _node_set_down, after=After.SPARE, takes=True),
    "crashed node": Ending((LOST, KILLED), _crashed_node, after=After.SPARE, takes=True),
    "preemption": Ending((STOPPED,), _at_once(_preempt)),
    "time limit": Ending((STOPPED, "(TimeLimit) before its batch script"), _time_limit),  # that if saves are slow
    "controller restarted": Ending((STOPPED,), _controller_restarted),
    "squeue failing": Ending((STOPPED,), _client_failing("squeue")),
    "scontrol failing": Ending((STOPPED,), _client_failing("scontrol")),
    "disk full at the end": Ending((STOPPED, LOST), _disk_full_at_the_end),
    "port taken": Ending((KILLED,), _port_taken, "rendezvous", After.SAME),
    "missing rank": Ending(
        ("did not arrive", "did not open port", "lost another rank"),
        _at_once(lambda victim: _kill([victim.tasks[victim.rank]], signal.SIGSTOP)),
        "rendezvous",
        After.SPARE,
        names=("rendezvous",),
        avoids=True,
    ),
    "hang": Ending(
        ("has sent no heartbeat", "does not answer", "lost another rank"),  # whichever process ends first
        _at_once(lambda victim: _kill([victim.tasks[victim.rank]], signal.SIGSTOP)),
        "training",
        After.SPARE,
        names=("hang",),
        avoids=True,
    ),
    "hardware error": Ending(
        ("uncorrectable ECC",), _hardware_error, "training", After.SPARE, names=("hardware",), avoids=True
    ),
    "flipped bit of a weight": _wrong_numbers("flipped bit", REPLICAS, (KILLED,)),
    "wrong matmul": _wrong_numbers(  # its process ends by itself, or the killed one is first
        "matmul", AUDITS, ("repeatedly", "again after a return", "lost another rank", KILLED)
    ),
    "slow rank": Ending(
        (KILLED,),
        _silent("slow rank", SLOW),
        "training",
        After.SAME,
        names=SLOW,
        updates=MOST_UPDATES + SLOW_REPORTS,
    ),
}
THREE_STOPS = "three stops while starting"


def _second_submission(site: Site, submit: Callable[[], str], stage: str) -> None:
    """A user's shell hides the waiting job from squeue, and the user submits the stage again."""
    job, jobs, environment = site.record(stage).job_id, site.jobs(), site.environment
    site.environment = environment | HIDING
    site.lab.run("scontrol", "hold", job)
    try:
        printed = submit()
    finally:
        site.environment = environment
        site.lab.run("scontrol", "release", job)
    assert site.jobs() == jobs, printed


def _disk_full_at_the_begin(site: Site, submit: Callable[[], str], stage: str) -> None:
    """The disk is full when the next attempt starts, until some seconds later."""
    job = site.record(stage).job_id
    with disk_full(site.runs):
        site.wait("the next attempt", lambda: site.queued(job).get(job) == "RUNNING")
        time.sleep(5)


BETWEEN = {"second submission": _second_submission, "disk full at the begin": _disk_full_at_the_begin}


class Deck:
    """Draws kinds at random, but each one once before any comes again."""

    def __init__(self, kinds: Iterable[str], draw: random.Random) -> None:
        self.kinds, self.random = list(kinds), draw
        self.left: list[str] = []

    def draw(self, fits: Callable[[str], bool] = lambda _: True) -> str | None:
        """The next kind that fits; None if none is left that does."""
        if not self.left:
            self.left = self.random.sample(self.kinds, len(self.kinds))
        name = next((name for name in reversed(self.left) if fits(name)), None)
        if name is not None:
            self.left.remove(name)
        return name
