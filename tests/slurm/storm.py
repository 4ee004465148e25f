"""A seeded storm of faults over a stage on the virtual SLURM, whose job has a spare node.

The stage must end as if nothing had happened.

    python -m tests.slurm.storm --faults 50 --seed 0

A pre-training is submitted as a user submits it, and each attempt meets one fault of tests/slurm/faults.py: while it
starts, before an update, or during a save. Its processes must then start again in the allocation that the job holds,
unless it was told to stop, or a node is lost or to blame and no spare one is left. faults.jsonl must name the machine
that a fault came to, and no other. If the launcher ends its job, since three attempts have saved nothing new, it is
submitted again. At the end its weights must equal those of an undisturbed run bit for bit, and job.json must have each
attempt and how it ended.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file

from mvd.data.synthetic_motion import generate_motion
from mvd.run_directory import RunDirectory
from tests.chaos.damage import DAMAGES
from tests.conftest import write_teachers
from tests.slurm.conftest import TINY, Site, end, stage_ids
from tests.slurm.faults import BETWEEN, ENDINGS, THREE_STOPS, Deck
from tests.slurm.lab import Lab, can_run, running_lab
from tests.slurm.lab.quirks import small_disk
from tests.slurm.storm_run import SAVED_EVERY, Run

UPDATES_PER_EPOCH = 6
RENDEZVOUS_MINUTES = 1
HANG_MINUTES = 2  # longer than any fault takes to come
MEGABYTES = 256  # of the disk that becomes full
MOMENTS = ("starting", "updating", "saving")
NODES = 4  # of the long storm, and a spare one
LAB = tuple(f"node{number}" for number in range(1, NODES + 4))  # two more take the place of those that are avoided
EPOCHS = 20


class Storm:
    """The faults that came to runs of one stage, and what they cost."""

    def __init__(
        self, lab: Lab, folder: Path, motion: Path, teachers: dict[str, str], seed: int, nodes: int, epochs: int
    ) -> None:
        """nodes: of the stage, to which a spare one comes. epochs: its length."""
        self.lab, self.folder, self.motion, self.teachers, self.nodes = lab, folder, motion, teachers, nodes
        self.random = random.Random(seed)
        self.length, self.updates = f"pretrain.optimization.epochs={epochs}", UPDATES_PER_EPOCH * epochs
        (self.stage,) = stage_ids(TINY, self.length)["pretrain"]
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.lost: dict[str, list[int]] = defaultdict(list)  # updates that must be repeated, by what ended the attempt
        self.seconds: dict[str, list[float]] = defaultdict(list)  # that a fault cost
        self.attempts = self.runs = self.given_up = 0
        self.guilty = self.named = 0  # faults of one machine, and those of them for which just this one was named

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
        self.submit_to(site)
        return site

    def submit_to(self, site: Site) -> str:
        """Submits the stage as a user does; returns what is printed."""
        shape = (
            f"cluster.pretrain.nodes={self.nodes}",
            "cluster.slurm.spare_nodes=1",
            f"cluster.checkpoint_every={SAVED_EVERY}",
            "cluster.workers=1",
            f"cluster.faults.rendezvous_minutes={RENDEZVOUS_MINUTES}",
            f"cluster.faults.hang_minutes={HANG_MINUTES}",
        )
        return site.submit(TINY, self.length, *shape, "--until", "pretrain")

    def report(self, seconds: float) -> str:
        """The figures, a line for each kind of fault."""
        head = f"{self.faults.total()} faults in {self.runs} runs and {self.attempts} attempts, {seconds:.0f} s"
        lines = [f"{head}; ended by the launcher and submitted again: {self.given_up}"]
        for name in (*ENDINGS, THREE_STOPS, *BETWEEN, *DAMAGES):
            lost = self.lost.get(name)
            cost = f", updates lost {statistics.mean(lost):.1f} (most {max(lost)})" if lost else ""
            lines.append(f"  {name}: {self.faults[name]}{cost}")
        lines += [f"seconds from {name}: {spread(self.seconds[name])}" for name in sorted(self.seconds)]
        lines.append(f"faults of one machine: {self.guilty}, of which it was named: {self.named}; false alarms: 0")
        lines.append("they came " + ", ".join(f"while {name}: {self.moments[name]}" for name in MOMENTS))
        return "\n".join([*lines, "all weights are equal to the undisturbed run's, bit for bit"])


def spread(seconds: Sequence[float]) -> str:
    """How many, their mean and standard deviation, and the largest."""
    if len(seconds) < 2:
        return f"{len(seconds)} measured"
    mean, deviation = statistics.mean(seconds), statistics.stdev(seconds)
    return f"{mean:.1f} +- {deviation:.1f} (most {max(seconds):.0f}; {len(seconds)} measured)"


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
        with running_lab(folder / "lab", LAB) as lab:
            storm = Storm(lab, folder, motion, write_teachers(folder / "teachers"), arguments.seed, NODES, EPOCHS)
            storm.disturb(arguments.faults)
    print(storm.report(time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
