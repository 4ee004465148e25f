"""A seeded storm of faults over a stage of two nodes on the virtual SLURM, which has to end as if nothing had happened.

    python -m tests.slurm.storm --faults 50 --seed 0

A pre-training, submitted as a user submits it, is signalled, preempted, requeued, killed in part and as a whole, robbed
of nodes and of checkpoints: while it starts, before an update, within a save. Where its job is given up, since three
attempts have saved nothing new, it is submitted again. In the end its weights have to be those of a run that nothing
happened to, bit for bit, and job.json has to know each attempt and how it ended.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file

from launch.job.record import Attempt
from mvd.data.synthetic_motion import generate_motion
from mvd.run_directory import RunDirectory, update_of
from tests.chaos.damage import DAMAGES, damage
from tests.conftest import write_teachers
from tests.slurm.conftest import TINY, Site, end, stage_ids
from tests.slurm.lab import Lab, can_run, running_lab, wait_for

SAVED_EVERY = 3
LENGTH = "pretrain.optimization.epochs=5"  # 30 updates
SHAPE = ("cluster.pretrain.nodes=2", f"cluster.checkpoint_every={SAVED_EVERY}", "cluster.workers=1")
STOPPED = "stopped before a time limit"
KILLED = "a process ended with exit code"
LOST = None  # SLURM requeues the job itself, and ends its batch script before it can say anything
ENDINGS = {  # how an attempt may end, and what job.json has to say of it then
    "USR2": STOPPED,
    "TERM": STOPPED,
    "kill one": KILLED,
    "kill all": KILLED,
    "kill srun": KILLED,
    "scontrol requeue": LOST,
    "node set down": LOST,
    "crashed node": LOST,
    "preemption": STOPPED,
    "time limit": STOPPED,
}
MOMENTS = ("starting", "updating", "saving")


class Storm:
    """The faults that came to runs of one stage, and what they cost."""

    def __init__(self, lab: Lab, folder: Path, motion: Path, teachers: dict[str, str], seed: int) -> None:
        self.lab, self.folder, self.motion, self.teachers = lab, folder, motion, teachers
        self.random = random.Random(seed)
        (self.stage,) = stage_ids(TINY, LENGTH)["pretrain"]
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.lost: dict[str, list[int]] = defaultdict(list)  # updates that were made in vain, by what ended the attempt
        self.attempts = self.runs = self.given_up = 0
        self.sites: list[Site] = []

    def blow(self, faults: int, endings: tuple[str, ...] = tuple(ENDINGS)) -> None:
        """Disturbs run after run until so many faults have come.

        Raises:
            AssertionError: weights differ, or job.json says something else than what happened.
        """
        try:
            self._blow(faults, endings)
        finally:
            for site in self.sites:
                end(site)

    def _blow(self, faults: int, endings: tuple[str, ...]) -> None:
        reference = self.submit("undisturbed")
        expected = {}
        while self.faults.total() < faults:
            self.runs += 1
            run = Run(self, self.submit(f"run-{self.runs}"))
            if not expected:
                reference.wait_for_result(self.stage)
                assert len(reference.record(self.stage).attempts) == 1
                expected = load_file(reference.runs / self.stage / "weights.safetensors")
            run.to_the_end(faults, endings)
            weights = load_file(run.directory / "weights.safetensors")
            assert weights.keys() == expected.keys(), "the weights have other names"
            wrong = [name for name in expected if not weights[name].equal(expected[name])]
            assert not wrong, f"{len(wrong)} tensors differ, such as {wrong[0]}"
            print(f"run {self.runs} is complete: {self.faults.total()} faults, all weights are equal", flush=True)

    def submit(self, name: str) -> Site:
        """A run of its own; all but the undisturbed one wait where `Run.plan` says."""
        (self.folder / name).mkdir()
        site = Site(self.lab, self.folder / name, self.motion, self.teachers)
        self.sites.append(site)
        if name != "undisturbed":
            Run.plan(self, site)
        site.submit(TINY, LENGTH, *SHAPE, "--until", "pretrain")
        return site

    def report(self, seconds: float) -> str:
        head = f"{self.faults.total()} faults in {self.runs} runs and {self.attempts} attempts, {seconds:.0f} s"
        lines = [f"{head}; given up by the launcher and submitted again: {self.given_up}"]
        for name in (*ENDINGS, *DAMAGES):
            lost = self.lost.get(name)
            cost = f", updates lost {statistics.mean(lost):.1f} (most {max(lost)})" if lost else ""
            lines.append(f"  {name}: {self.faults[name]}{cost}")
        lines.append("they came " + ", ".join(f"while {name}: {self.moments[name]}" for name in MOMENTS))
        return "\n".join([*lines, "all weights are equal to the undisturbed run's, bit for bit"])


class Run:
    """One run in the storm, from its submission to its result."""

    def __init__(self, storm: Storm, site: Site) -> None:
        self.storm, self.site, self.lab, self.random = storm, site, storm.lab, storm.random
        self.directory = site.runs / storm.stage
        self.reached = site.brake.with_suffix(".reached")
        self.number = 0  # of the attempt, since the last submission

    @staticmethod
    def plan(storm: Storm, site: Site) -> None:
        """Says where the next attempt is to wait for its fault."""
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
        return (self.directory / "result.json").exists()

    @property
    def newest(self) -> int:
        """The update of the newest checkpoint; 0 where there is none."""
        return max(map(update_of, RunDirectory(self.directory).complete_checkpoints()), default=0)

    def to_the_end(self, faults: int, endings: tuple[str, ...]) -> None:
        """One attempt after the other, each with a fault until there have been enough."""
        while not self.complete:
            self.number += 1
            self.storm.attempts += 1
            if self.storm.faults.total() >= faults:
                self.site.brake.unlink(missing_ok=True)
                self.site.wait_for_result(self.storm.stage)
            else:
                self.one_attempt(self.random.choice(endings))
        self.site.wait_until_idle()
        record = self.site.record(self.storm.stage)
        assert len(record.attempts) == self.number and record.requeued == self.number - 1 and record.error is None

    def one_attempt(self, ending: str) -> None:
        stage = self.storm.stage
        starting = self.random.random() < 0.2
        self.site.wait(f"attempt {self.number}", lambda: len(self.attempts()) == self.number)
        self.site.wait("its processes", lambda: self.complete or len(self.lab.tasks(self.job)) == 2)
        if starting:
            time.sleep(self.random.uniform(0, 5))
        else:
            self.site.wait("its fault's moment", lambda: self.complete or self.reached.exists())
        if self.complete:
            return
        node = self.random.choice(self.nodes())
        self.strike(ending, node)
        self.site.wait("the attempt's end", lambda: self.complete or self.over())
        self.mend(ending, node)
        if self.complete:
            return  # it has come to its end before the fault came
        moment = self.moment()
        self.settle(ending, moment)
        if self.newest and self.random.random() < 0.3:
            self.storm.faults[damage(self.directory, self.random)] += 1
        self.plan(self.storm, self.site)
        print(f"attempt {self.number}, {ending} while {moment}: {self.storm.faults.total()} faults so far", flush=True)
        if self.site.record(stage).error:
            self.submit_again()

    def nodes(self) -> list[str]:
        listed = self.lab.run("squeue", "-h", "-j", self.job, "-o", "%N").strip()
        return self.lab.run("scontrol", "show", "hostnames", listed).split()

    def strike(self, ending: str, node: str) -> None:
        """Lets the fault come, to this node of the job where it comes to one."""
        job, tasks = self.job, self.lab.tasks(self.job)
        match ending:
            case "USR2" | "TERM":
                self.lab.run("scancel", f"--signal={ending}", job)
            case "kill one":
                _kill([tasks[self.random.randrange(2)]])
            case "kill all":
                _kill(tasks.values())
            case "kill srun":
                _kill(self.lab.launchers(job))
            case "scontrol requeue":
                self.lab.run("scontrol", "requeue", job)
            case "node set down":
                self.lab.run("scontrol", "update", f"nodename={node}", "state=down", "reason=storm")
            case "crashed node":
                self.lab.crash(node)
            case "preemption":
                self.lab.run("sbatch", "-p", "high", "--exclusive", "-w", node, "-o", "/dev/null", "--wrap", "sleep 1")
            case "time limit":
                self.lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")

    def mend(self, ending: str, node: str) -> None:
        """Undoes what would outlast the attempt."""
        match ending:
            case "node set down":
                wait_for("the nodes", self.lab.nodes_ready)
            case "crashed node":
                self.lab.restart(node)
                wait_for("the nodes", self.lab.nodes_ready)
            case "time limit":
                self.lab.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=60", check=False)  # it may be over

    def attempts(self) -> list[Attempt]:
        return self.site.record(self.storm.stage).attempts

    def moment(self) -> str:
        """How far the attempt had come when its fault came: it did not get beyond where it was to wait for that."""
        if not self.reached.exists():
            return "starting"
        return "saving" if json.loads(self.site.brake.read_text())["flush"] else "updating"

    def over(self) -> bool:
        """Whether the attempt's processes are gone, and its job waits or is given up."""
        state = self.site.queued(self.job).get(self.job, "gone")
        return state in ("PENDING", "gone") and not self.lab.tasks(self.job)

    def settle(self, ending: str, moment: str) -> None:
        """Counts what the attempt has suffered, and compares that with what job.json says."""
        error, said = self.attempts()[-1].error, {ENDINGS[ending]}
        if moment == "starting" and said == {STOPPED}:
            said.add(KILLED)  # before there is anything to lose, processes leave at once
        assert any(word in error for word in said if word) if error else said == {LOST}, (ending, moment, error)
        self.storm.faults[ending] += 1
        self.storm.moments[moment] += 1
        at = int(self.reached.read_text()) if self.reached.exists() else 0
        self.storm.lost[ending].append(max(at - self.newest, 0))

    def submit_again(self) -> None:
        """What a user does when the launcher has given a stage up."""
        assert "attempts have saved nothing new" in (self.site.record(self.storm.stage).error or "")
        self.storm.given_up += 1
        self.number = 0
        self.site.wait_until_idle()
        self.site.submit(TINY, LENGTH, *SHAPE, "--until", "pretrain")


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # the first one's death may end it
            os.kill(process, signal.SIGKILL)


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
            storm.blow(arguments.faults)
    print(storm.report(time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
