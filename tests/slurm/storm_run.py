"""One run in the storm on SLURM: its attempts, their faults, and what must be said of each."""

import itertools
import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

from launch.job.record import Attempt, Record
from mvd.run_directory import RunDirectory, update_of
from tests.chaos.damage import damage
from tests.slurm.conftest import Site
from tests.slurm.faults import BETWEEN, ENDINGS, KILLED, LOST, STOPPED, THREE_STOPS, After, Deck, Ending, Victim
from tests.slurm.lab import processes

if TYPE_CHECKING:
    from tests.slurm.storm import Storm

SAVED_EVERY = 3


class Run:
    """One run in the storm, from its submission to its result."""

    def __init__(self, storm: "Storm", site: Site) -> None:
        self.storm, self.site, self.lab, self.random = storm, site, storm.lab, storm.random
        self.files = RunDirectory(site.runs / storm.stage)
        self.reached = site.brake.with_suffix(".reached")
        self.number = 0  # of the attempt, since the last submission
        self.bad: list[str] = []  # nodes that the next attempt must avoid
        self.lost: str | None = None  # the node that the last fault took away
        self.in_place: bool | None = None  # whether the next attempt must start in the same allocation
        self.faults_seen = 0  # lines of faults.jsonl
        self.struck: dict[str, float] = {}  # attempt -> when its fault came, in seconds since the epoch

    @staticmethod
    def plan(storm: "Storm", site: Site) -> None:
        """Says where the next attempt pauses for its fault."""
        draw = storm.random
        flush = draw.choice((0, 0, draw.randint(1, 8)))
        plan = {"updates": draw.randint(0, 2 * SAVED_EVERY), "flush": flush, "rank": draw.randrange(storm.nodes)}
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
            name = endings.draw(self.is_possible) if self.storm.faults.total() < faults else None
            if name is None:
                self.count_attempt()
                self.site.brake.unlink(missing_ok=True)
                self.site.wait_for_result(self.storm.stage)
                self.count_start_without_node()
            elif name == THREE_STOPS:
                self.three_stops()
            else:
                self.one_attempt(name, between)
        self.site.wait_until_idle()
        record = self.site.record(self.storm.stage)
        assert len(record.attempts) == self.number and record.error is None
        assert record.requeued + record.restarted == self.number - 1
        self.check_names(None, None)
        self.time(record)

    def is_possible(self, name: str) -> bool:
        """Whether enough updates are left in the run for a fault to be found."""
        return name == THREE_STOPS or ENDINGS[name].updates <= self.storm.updates - self.newest

    def count_attempt(self) -> None:
        self.number += 1
        self.storm.attempts += 1

    def count_start_without_node(self) -> None:
        """Counts an attempt that failed since SLURM did not know yet that a node was gone."""
        if self.lost and self.number < len(self.attempts()):
            assert f"could not start a process on {self.lost}" in (self.attempts()[-2].error or ""), self.attempts()[-2]
            self.count_attempt()

    def time(self, record: Record) -> None:
        """Notes how long after a fault, and after the end of its attempt, the next one trained, and how it started."""
        entries = json.loads(self.files.provenance.read_text())
        trained = {entry["owner"]: _seconds(entry["training"]) for entry in entries if "training" in entry}
        for before, after in itertools.pairwise(record.attempts):
            came, begun = self.struck.get(before.name), trained.get(after.name)
            kind = "restart in place" if after.start else "requeue"
            if came is not None and begun is not None:
                self.storm.seconds[f"the fault to training, by {kind}"].append(begun - came)
            if before.ended and begun is not None:
                self.storm.seconds[f"the end of the processes to training, by {kind}"].append(
                    begun - _seconds(before.ended)
                )

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
            BETWEEN[nuisance](self.site, lambda: self.storm.submit_to(self.site), self.storm.stage)
            self.storm.faults[nuisance] += 1

    def suffer(self, ending: Ending, starting: bool) -> str:
        """Waits for the next attempt and lets a fault end it; returns the moment at which the fault came."""
        self.count_attempt()
        self.site.wait(f"attempt {self.number}", lambda: len(self.attempts()) >= self.number)
        self.site.wait("its processes", lambda: self.complete or len(self.lab.tasks(self.job)) == self.storm.nodes)
        if starting:
            time.sleep(self.random.uniform(0, 5))
        elif ending.moment != "rendezvous":
            self.site.wait("its fault's moment", lambda: self.complete or self.reached.exists())
        if self.complete:
            return "updating"
        victim, attempt = self.victim(), self.attempts()[-1]
        self.check_start(victim, attempt)
        first = self.nodes()[0]
        self.struck[attempt.name] = time.time()
        with ending.strike(victim):
            self.site.wait("the attempt's end", lambda: self.complete or self.over())
            moment = self.moment()
            self.reached_at = int(self.reached.read_text()) if self.reached.exists() else 0
            self.plan(self.storm, self.site)  # at once: the next attempt may be starting
            allocated = self.nodes()
        if not self.complete:
            self.check(ending, moment)
            self.check_names(ending, victim)
            self.bad += [victim.host_of[victim.rank]] if ending.avoids else []
            self.lost = victim.node if ending.takes else None
            enough = len(set(allocated) - {*self.bad, self.lost}) >= self.storm.nodes and self.lost != first
            self.in_place = ending.after is After.SAME or (ending.after is After.SPARE and enough)
            if STOPPED in ending.said and STOPPED not in (self.attempts()[self.number - 1].error or ""):
                self.in_place = None  # the processes did not know yet what stopped them, or the disk did not take it
        return moment

    def check_start(self, victim: Victim, attempt: Attempt) -> None:
        """Compares where the attempt runs with what the last fault must have led to."""
        self.count_start_without_node()
        assert len(self.attempts()) == self.number
        if self.in_place is not None:
            assert bool(attempt.start) == self.in_place, (self.number, "in place" if attempt.start else "requeued")
        if not attempt.start:
            self.bad = self.bad[-1:]  # SLURM may need the others, if it has no more
        assert not {*self.bad, self.lost if attempt.start else None} & victim.hosts, (self.bad, self.lost, victim.hosts)

    def victim(self) -> Victim:
        """The attempt, with the rank that `plan` chose and a random node."""
        job, rank = self.job, json.loads(self.site.brake.read_text())["rank"]
        tasks = self.lab.tasks(job)
        host_of = {rank: processes.environment_of(pid)["SLURMD_NODENAME"] for rank, pid in tasks.items()}
        node = self.random.choice(sorted(set(host_of.values())))
        return Victim(self.lab, self.site, self.files, job, tasks, host_of, node, rank)

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
            expected |= {
                KILLED,
                LOST,
            }  # before there is anything to lose, they leave at once, or submitit requeues the job
        assert any(text in error for text in expected if text) if error else None in expected, (ending, moment, error)

    def check_names(self, ending: Ending | None, victim: Victim | None) -> None:
        """Compares the hosts that faults.jsonl names with the one that the fault came to."""
        faults = self.files.read_faults()[self.faults_seen :]
        self.faults_seen += len(faults)
        guilty = victim.host_of[victim.rank] if ending and victim and ending.names else None
        may_be = {guilty, self.lost, victim.node if ending and victim and ending.takes else None}
        nodes = self.lab.nodes
        for fault in faults:
            named = {
                *fault["hosts"],
                *(node for node in nodes if fault["fault"] == "slow" and node in fault["message"]),
            }
            assert named <= may_be, ("a false alarm", fault, may_be)
        if guilty is not None:
            assert ending is not None
            self.storm.guilty += 1
            found = [fault for fault in faults if fault["fault"] in ending.names]
            assert any(guilty in fault["hosts"] or guilty in fault["message"] for fault in found), (guilty, faults)
            self.storm.named += 1

    def count(self, name: str, moment: str) -> None:
        self.storm.faults[name] += 1
        self.storm.moments[moment] += 1
        self.storm.lost[name].append(max(self.reached_at - self.newest, 0))
        print(f"attempt {self.number}, {name} while {moment}: {self.storm.faults.total()} faults so far", flush=True)

    def submit_again(self) -> None:
        """What a user does when the launcher has ended the job."""
        assert "attempts have saved nothing new" in (self.error or "")
        self.storm.given_up += 1
        self.number, self.in_place, self.bad, self.lost = 0, None, [], None
        self.site.wait_until_idle()
        self.storm.submit_to(self.site)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
