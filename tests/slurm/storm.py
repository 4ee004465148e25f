"""A seeded storm of faults over a stage of two nodes and a spare one on the virtual SLURM.

The stage must end as if nothing had happened.

    python -m tests.slurm.storm --faults 50 --seed 0

A pre-training is submitted as a user submits it, and each attempt meets one fault of tests/slurm/faults.py: while it
starts, before an update, or during a save. Its processes must then start again in the allocation that the job holds,
unless it was told to stop, a node was lost, or no spare one is left for one that is blamed. If the launcher ends its
job, since three attempts have saved nothing new, it is submitted again. At the end its weights must equal those of an
undisturbed run bit for bit, and job.json must have each attempt and how it ended.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.job.record import Attempt, Record
from mvd.data.synthetic_motion import generate_motion
from mvd.run_directory import RunDirectory, update_of
from tests.chaos.damage import DAMAGES, damage
from tests.conftest import write_teachers
from tests.slurm.conftest import TINY, Site, end, stage_ids
from tests.slurm.faults import BETWEEN, ENDINGS, KILLED, STOPPED, THREE_STOPS, Deck, Ending, Victim
from tests.slurm.lab import Lab, can_run, processes, running_lab
from tests.slurm.lab.quirks import small_disk

SAVED_EVERY = 3
LENGTH = "pretrain.optimization.epochs=5"  # 30 updates
RENDEZVOUS_MINUTES = 1
HANG_MINUTES = 2  # longer than any fault takes to come
NODES = 2  # and a spare one
SHAPE = (
    f"cluster.pretrain.nodes={NODES}",
    "cluster.slurm.spare_nodes=1",
    f"cluster.checkpoint_every={SAVED_EVERY}",
    "cluster.workers=1",
    f"cluster.faults.rendezvous_minutes={RENDEZVOUS_MINUTES}",
    f"cluster.faults.hang_minutes={HANG_MINUTES}",
)
MEGABYTES = 256  # of the disk that becomes full
IN_PLACE = ({KILLED},)  # what job.json says of faults after which no other allocation is needed
MOMENTS = ("starting", "updating", "saving")


class Storm:
    """The faults that came to runs of one stage, and what they cost."""

    def __init__(self, lab: Lab, folder: Path, motion: Path, teachers: dict[str, str], seed: int) -> None:
        self.lab, self.folder, self.motion, self.teachers = lab, folder, motion, teachers
        self.random = random.Random(seed)
        (self.stage,) = stage_ids(TINY, LENGTH)["pretrain"]
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.lost: dict[str, list[int]] = defaultdict(list)  # updates that must be repeated, by what ended the attempt
        self.seconds: dict[str, list[float]] = {"restart in place": [], "requeue": []}  # from a fault to training
        self.attempts = self.runs = self.given_up = 0

    def disturb(self, faults: int, endings: Sequence[str] = (*ENDINGS, THREE_STOPS)) -> None:
        """Disturbs run after run until so many faults have come.

        Raises:
            AssertionError: weights differ, or job.json does not say what happened.
        """
        with ExitStack() as self.cleanup:
            self._disturb(faults, Deck(endings, self.random), Deck(BETWEEN, self.random))

    def _disturb(self, faults: int, endings: Deck, between: Deck) -> None:
        expected = self.undisturbed()
        while self.faults.total() < faults:
            self.runs += 1
            run = Run(self, self.submit(f"run-{self.runs}"))
            run.to_the_end(faults, endings, between)
            weights = load_file(run.files.weights)
            assert weights.keys() == expected.keys(), "the weights have other names"
            wrong = [name for name in expected if not weights[name].equal(expected[name])]
            assert not wrong, f"{len(wrong)} tensors differ, such as {wrong[0]}"
            print(f"run {self.runs} is complete: {self.faults.total()} faults, all weights are equal", flush=True)

    def undisturbed(self) -> dict[str, torch.Tensor]:
        """The weights that every run must end with."""
        site = self.submit("undisturbed")
        site.wait_for_result(self.stage)
        assert len(site.record(self.stage).attempts) == 1
        return load_file(RunDirectory(site.runs / self.stage).weights)

    def submit(self, name: str) -> Site:
        """A run of its own; all but the undisturbed one pause where `Run.plan` says, and have a small disk."""
        (self.folder / name).mkdir()
        site = Site(self.lab, self.folder / name, self.motion, self.teachers)
        if name != "undisturbed":
            self.cleanup.enter_context(small_disk(site.runs, MEGABYTES))
            Run.plan(self, site)
        self.cleanup.callback(end, site)
        submit(site)
        return site

    def report(self, seconds: float) -> str:
        """The figures, a line for each kind of fault."""
        head = f"{self.faults.total()} faults in {self.runs} runs and {self.attempts} attempts, {seconds:.0f} s"
        lines = [f"{head}; ended by the launcher and submitted again: {self.given_up}"]
        for name in (*ENDINGS, THREE_STOPS, *BETWEEN, *DAMAGES):
            lost = self.lost.get(name)
            cost = f", updates lost {statistics.mean(lost):.1f} (most {max(lost)})" if lost else ""
            lines.append(f"  {name}: {self.faults[name]}{cost}")
        for name, waits in self.seconds.items():
            lines.append(f"seconds from the fault to training by {name}: {spread(waits)}")
        lines.append("they came " + ", ".join(f"while {name}: {self.moments[name]}" for name in MOMENTS))
        return "\n".join([*lines, "all weights are equal to the undisturbed run's, bit for bit"])


class Run:
    """One run in the storm, from its submission to its result."""

    def __init__(self, storm: Storm, site: Site) -> None:
        self.storm, self.site, self.lab, self.random = storm, site, storm.lab, storm.random
        self.files = RunDirectory(site.runs / storm.stage)
        self.reached = site.brake.with_suffix(".reached")
        self.number = 0  # of the attempt, since the last submission
        self.avoided: str | None = None  # the host that the next attempt must avoid
        self.in_place = False  # whether the next attempt must start in the same allocation
        self.struck: dict[str, float] = {}  # attempt -> when its fault came, in seconds since the epoch

    @staticmethod
    def plan(storm: Storm, site: Site) -> None:
        """Says where the next attempt pauses for its fault."""
        draw = storm.random
        flush = draw.choice((0, 0, draw.randint(1, 8)))
        plan = {"updates": draw.randint(0, 2 * SAVED_EVERY), "flush": flush, "rank": draw.randrange(2)}
        site.brake.with_suffix(".reached").unlink(missing_ok=True)
        site.brake.write_text(json.dumps(plan))

    @property
    def job(self) -> str:
        return self.site.record(self.storm.stage).job_id

    @property
    def complete(self) -> bool:
        return self.files.result.exists()

    @property
    def newest(self) -> int:
        """The update of the newest checkpoint; 0 if there is none."""
        return max(map(update_of, self.files.complete_checkpoints()), default=0)

    @property
    def error(self) -> str | None:
        """The error that has ended the job."""
        return self.site.record(self.storm.stage).error

    def to_the_end(self, faults: int, endings: Deck, between: Deck) -> None:
        """One attempt after the other, each with a fault until there have been enough."""
        while not self.complete:
            if self.storm.faults.total() >= faults:
                self.number += 1
                self.storm.attempts += 1
                self.site.brake.unlink(missing_ok=True)
                self.site.wait_for_result(self.storm.stage)
            elif (name := endings.draw()) == THREE_STOPS:
                self.three_stops()
            else:
                self.one_attempt(name, between)
        self.site.wait_until_idle()
        record = self.site.record(self.storm.stage)
        assert len(record.attempts) == self.number and record.error is None
        assert record.requeued + record.restarted == self.number - 1
        self.time(record)

    def time(self, record: Record) -> None:
        """Notes how long after a fault the next attempt trained, by how it was started."""
        entries = json.loads(self.files.provenance.read_text())
        trained = {entry["owner"]: entry["training"] for entry in entries if "training" in entry}
        for before, after in itertools.pairwise(record.attempts):
            came, begun = self.struck.get(before.name), trained.get(after.name)
            if came is not None and begun is not None:
                kind = "restart in place" if after.start else "requeue"
                self.storm.seconds[kind].append(datetime.fromisoformat(begun).timestamp() - came)

    def three_stops(self) -> None:
        """Three attempts are told to stop before they have trained; the launcher must not end the job because of it."""
        for _ in range(3):
            moment = self.suffer(ENDINGS["USR2"], starting=True)
            if self.complete:
                return
            assert self.error is None
        self.count(THREE_STOPS, moment)

    def one_attempt(self, name: str, between: Deck) -> None:
        """One attempt and its fault, then perhaps one between it and the next."""
        ending = ENDINGS[name]
        moment = self.suffer(ending, starting=ending.moment == "any" and self.random.random() < 0.2)
        if self.complete:
            return  # before the fault came
        self.count(name, moment)
        waits = self.site.queued(self.job).get(self.job) == "PENDING"  # not if the next attempt reads the checkpoints
        if waits and self.newest and self.random.random() < 0.3:
            self.storm.faults[damage(self.files.path, self.random)] += 1
        if self.error:
            self.submit_again()
        elif waits and self.random.random() < 0.3:
            nuisance = between.draw()
            BETWEEN[nuisance](self.site, lambda: submit(self.site), self.storm.stage)
            self.storm.faults[nuisance] += 1

    def suffer(self, ending: Ending, starting: bool) -> str:
        """Waits for the next attempt and lets a fault end it; returns the moment at which the fault came."""
        self.number += 1
        self.storm.attempts += 1
        self.site.wait(f"attempt {self.number}", lambda: len(self.attempts()) == self.number)
        self.site.wait("its processes", lambda: self.complete or len(self.lab.tasks(self.job)) == 2)
        if starting:
            time.sleep(self.random.uniform(0, 5))
        elif ending.moment != "rendezvous":
            self.site.wait("its fault's moment", lambda: self.complete or self.reached.exists())
        if self.complete:
            return "updating"
        victim = self.victim()
        assert self.avoided not in victim.hosts, f"{self.avoided} is to blame, and is not avoided"
        attempt = self.attempts()[-1]
        if self.number > 1:
            assert bool(attempt.start) or not self.in_place, (self.number, "was not started in place")
        host, self.avoided = victim.host, None
        allocated = self.nodes()
        self.struck[attempt.name] = time.time()
        with ending.strike(victim):
            self.site.wait("the attempt's end", lambda: self.complete or self.over())
            moment = self.moment()
            self.reached_at = int(self.reached.read_text()) if self.reached.exists() else 0
            self.plan(self.storm, self.site)  # at once: the next attempt may be starting
        if not self.complete:
            self.check(ending, moment)
            self.avoided = host if ending.blames else None
            spare = len(allocated) > NODES
            self.in_place = set(ending.said) in IN_PLACE or (ending.blames and spare)
        return moment

    def victim(self) -> Victim:
        """The attempt, with the rank that `plan` chose and a random node."""
        job, rank = self.job, json.loads(self.site.brake.read_text())["rank"]
        tasks = self.lab.tasks(job)
        node = self.random.choice(sorted({processes.environment_of(pid)["SLURMD_NODENAME"] for pid in tasks.values()}))
        return Victim(self.lab, self.site, self.files, job, tasks, node, rank)

    def nodes(self) -> list[str]:
        listed = self.lab.run("squeue", "-h", "-j", self.job, "-o", "%N").strip()
        return self.lab.run("scontrol", "show", "hostnames", listed).split()

    def attempts(self) -> list[Attempt]:
        return self.site.record(self.storm.stage).attempts

    def moment(self) -> str:
        """How far the attempt had come when its fault came: not beyond the place where it pauses for it."""
        if not self.reached.exists():
            return "starting"
        return "saving" if json.loads(self.site.brake.read_text())["flush"] else "updating"

    def over(self) -> bool:
        """Whether the next attempt has begun, or the processes are gone and their job waits or has ended."""
        if len(self.attempts()) > self.number:
            return True
        state = self.site.queued(self.job).get(self.job, "gone")
        return state in ("PENDING", "gone") and not self.lab.tasks(self.job)

    def check(self, ending: Ending, moment: str) -> None:
        """Compares what job.json says of the attempt with what has happened."""
        error = self.attempts()[self.number - 1].error
        expected = set(ending.said)
        if moment == "starting" and STOPPED in expected:
            expected.add(KILLED)  # before there is anything to lose, processes leave at once
        assert any(text in error for text in expected if text) if error else None in expected, (ending, moment, error)

    def count(self, name: str, moment: str) -> None:
        self.storm.faults[name] += 1
        self.storm.moments[moment] += 1
        self.storm.lost[name].append(max(self.reached_at - self.newest, 0))
        print(f"attempt {self.number}, {name} while {moment}: {self.storm.faults.total()} faults so far", flush=True)

    def submit_again(self) -> None:
        """What a user does when the launcher has ended the job."""
        assert "attempts have saved nothing new" in (self.error or "")
        self.storm.given_up += 1
        self.number, self.in_place = 0, False
        self.site.wait_until_idle()
        submit(self.site)


def spread(seconds: Sequence[float]) -> str:
    """How many, their mean and standard deviation, and the largest."""
    if len(seconds) < 2:
        return f"{len(seconds)} measured"
    mean, deviation = statistics.mean(seconds), statistics.stdev(seconds)
    return f"{mean:.1f} +- {deviation:.1f} (most {max(seconds):.0f}; {len(seconds)} measured)"


def submit(site: Site) -> str:
    return site.submit(TINY, LENGTH, *SHAPE, "--until", "pretrain")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="how many at least (50)")
    parser.add_argument("--seed", type=int, default=0, help="which storm (0)")
    arguments = parser.parse_args()
    if not can_run():
        print("error: this needs root on Debian or Ubuntu", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mvd-slurm-storm-") as name:
        folder = Path(name)
        for part in ("lab", "teachers"):
            (folder / part).mkdir()
        motion = generate_motion(folder / "motion", train=48, val=16)
        with running_lab(folder / "lab") as lab:
            storm = Storm(lab, folder, motion, write_teachers(folder / "teachers"), arguments.seed)
            storm.disturb(arguments.faults)
    print(storm.report(time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
