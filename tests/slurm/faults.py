"""The faults of the storm on SLURM. Those of `ENDINGS` end an attempt, those of `BETWEEN` come between two attempts."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from mvd.owner import read_owner
from mvd.run_directory import RunDirectory
from tests.slurm.conftest import Site
from tests.slurm.lab import Lab, processes, wait_for
from tests.slurm.lab.quirks import clients_failing, controller_down, disk_full, port_taken

SECONDS_WITHOUT_CONTROLLER = 40
SECONDS_WITHOUT_CLIENT = 10  # after the end of the processes
HARDWARE_ERROR = "CUDA error: uncorrectable ECC error encountered"
HIDING = {"SQUEUE_STATES": "COMPLETED", "SQUEUE_PARTITION": "high"}  # hides a user's own job from squeue

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
    node: str
    rank: int

    @property
    def hosts(self) -> set[str]:
        """The nodes of the processes."""
        return {processes.environment_of(pid)["SLURMD_NODENAME"] for pid in self.tasks.values()}

    @property
    def host(self) -> str:
        """The node of the rank."""
        return processes.environment_of(self.tasks[self.rank])["SLURMD_NODENAME"]

    def tell(self, name: str) -> None:
        """Send a signal to all processes, as a person does."""
        self.lab.run("scancel", f"--signal={name}", self.job)


Strike = Callable[[Victim], AbstractContextManager[None]]


class Ending(NamedTuple):
    """A fault that ends an attempt.

    said: what job.json may say of it. strike: a context manager that lets the fault come, and undoes at its exit what
    would outlast the attempt. moment: "rendezvous" or "training" if the fault can come only then. blames: whether the
    rank's host must be avoided afterwards.
    """

    said: tuple[str | None, ...]
    strike: Strike
    moment: str = "any"
    blames: bool = False


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
            time.sleep(SECONDS_WITHOUT_CLIENT)

    return _at_once(act)


@contextmanager
def _disk_full_at_the_end(victim: Victim) -> Iterator[None]:
    with disk_full(victim.site.runs):
        victim.tell("USR2")
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


ENDINGS = {
    "USR2": Ending((STOPPED,), _at_once(lambda victim: victim.tell("USR2"))),
    "TERM": Ending((STOPPED,), _at_once(lambda victim: victim.tell("TERM"))),
    "kill one": Ending((KILLED,), _at_once(lambda victim: _kill([victim.tasks[victim.rank]]))),
    "kill all": Ending((KILLED,), _at_once(lambda victim: _kill(victim.tasks.values()))),
    "kill srun": Ending((KILLED,), _at_once(lambda victim: _kill(victim.lab.launchers(victim.job)))),
    "scontrol requeue": Ending((LOST,), _at_once(lambda victim: victim.lab.run("scontrol", "requeue", victim.job))),
    "node set down": Ending((LOST,), _node_set_down),
    "crashed node": Ending((LOST,), _crashed_node),
    "preemption": Ending((STOPPED,), _at_once(_preempt)),
    "time limit": Ending((STOPPED,), _time_limit),
    "controller restarted": Ending((STOPPED,), _controller_restarted),
    "squeue failing": Ending((STOPPED,), _client_failing("squeue")),
    "scontrol failing": Ending((STOPPED,), _client_failing("scontrol")),
    "disk full at the end": Ending((STOPPED, LOST), _disk_full_at_the_end),
    "port taken": Ending((KILLED,), _port_taken, "rendezvous"),
    "missing rank": Ending(
        ("did not arrive", "did not open port"),
        _at_once(lambda victim: _kill([victim.tasks[victim.rank]], signal.SIGSTOP)),
        "rendezvous",
        blames=True,
    ),
    "hang": Ending(
        ("has sent no heartbeat", "does not answer"),
        _at_once(lambda victim: _kill([victim.tasks[victim.rank]], signal.SIGSTOP)),
        "training",
        blames=True,
    ),
    "hardware error": Ending(("uncorrectable ECC",), _hardware_error, "training", blames=True),
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

    def draw(self) -> str:
        if not self.left:
            self.left = self.random.sample(self.kinds, len(self.kinds))
        return self.left.pop()
