"""A seeded storm of faults over real runs of two processes, which must end as the undisturbed ones do.

    python -m tests.chaos.storm --faults 50 --seed 0
    python -m tests.chaos.storm --faults 50 --group 3

Runs with drop path, two broken videos and updates whose loss is not a number are killed, signalled, deprived of loader
processes, checkpoints and disk space, and started again until they are complete. Then their weights must equal those
of undisturbed runs that skip the same updates, bit for bit. The runs are fine-tunings, with dropout and mixing, or
pre-trainings of a group that shares its teachers, against each of its students alone; sometimes one is left out, which
joins the others again later. What happens to one student must not send the others back.
"""

import argparse
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file

from launch.local.processes import _free_port
from mvd.data.loader import steps_per_epoch
from mvd.distributed.exit_codes import RETRYABLE, STOPPED
from mvd.files import write_json
from mvd.run_directory import MANIFEST
from mvd.stage import Stage
from tests.chaos.damage import DAMAGES, damage
from tests.chaos.subjects import GOES_BACK, NAN, finetuning, group
from tests.chaos.victim import Plan, be
from tests.runs import write_stage

MEGABYTES = 64  # of the disk that becomes full, for each stage
ENDINGS = {  # how an attempt may end: the exit codes of the two processes, none of them 0
    "USR2": {STOPPED},
    "TERM": {STOPPED},
    "INT": {STOPPED},
    "kill one": {RETRYABLE, -signal.SIGKILL},  # the other one leaves by itself
    "kill both": {-signal.SIGKILL},
    "kill a loader": {RETRYABLE},
    "kill in a save": {RETRYABLE, -signal.SIGKILL},
    "kill at any time": {-signal.SIGKILL},
    "hanging video": {RETRYABLE},
}
NUISANCES = ("USR1", "full disk", "failing reads", "NaN", "left out")


class Storm:
    """The faults to come, those that came, and what they cost. students: of a group; 1 for a fine-tuning."""

    def __init__(self, folder: Path, seed: int, students: int = 1) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.disk, self.notes = folder / "disk", folder / "notes"
        self.notes.mkdir()
        self.mounted = _mount(self.disk, students * MEGABYTES)
        self.faults: Counter[str] = Counter()
        self.lost: dict[str, list[int]] = defaultdict(list)  # updates to repeat, by what ended the attempt
        self.attempts = self.runs = 0
        self.damaged: set[str] = set()  # stages whose newest checkpoint is, and that have not gone on since
        self.endings: list[str] = []  # that are still to come before any is repeated
        self.data, self.stages = finetuning(folder) if students == 1 else group(folder, students)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)  # a process may still hold a file of it

    def undisturbed(self) -> list[dict]:
        """The weights that each stage must end with, made alone."""
        weights = []
        for stage in self.stages(self.folder / "undisturbed"):
            path = write_stage(stage)
            write_json(stage.directory / "skipped.json", {"skipped": NAN.get(stage.id, ()), "rollbacks": []})
            codes = self.attempt([path], Plan(self.notes))
            if codes != [0, 0]:
                raise SystemExit(f"the undisturbed {stage.id} ended with {codes}: {_output([stage])}")
            weights.append(load_file(stage.files.weights))
        return weights

    def disturb(self, faults: int) -> None:
        """Disturbs run after run until so many faults have come."""
        expected = self.undisturbed()
        while self.faults.total() < faults:
            self.runs += 1
            self.damaged.clear()
            shutil.rmtree(self.disk / "runs", ignore_errors=True)
            stages = self.stages(self.disk / "runs")
            for stage in stages:
                write_stage(stage)
            while left := [stage for stage in stages if not stage.files.result.exists()]:
                self.one_attempt(left, quiet=self.faults.total() >= faults)
            self.faults["NaN"] += sum(stage.id in NAN for stage in stages)
            wrong = [
                f"{stage.id}: {name}"
                for stage, weights in zip(stages, expected, strict=True)
                for name, weight in load_file(stage.files.weights).items()
                if not weight.equal(weights[name])
            ]
            skipped = [(stage.files.read_result() or {})["skipped_updates"] for stage in stages]
            print(f"run {self.runs} is complete: {self.faults.total()} faults, {len(wrong)} tensors differ", flush=True)
            if wrong or skipped != [[*NAN.get(stage.id, ())] for stage in stages]:
                self.fail(f"{len(wrong)} tensors of the weights differ; the skipped updates are {skipped}")

    def fail(self, message: str) -> None:
        evidence = tempfile.mkdtemp(prefix="mvd-storm-evidence-")
        shutil.copytree(self.folder, evidence, dirs_exist_ok=True, ignore=lambda *_: ["ballast"])
        raise SystemExit(f"{message}; all runs are in {evidence}")

    def one_attempt(self, left: Sequence[Stage], quiet: bool) -> None:
        """Starts the unfinished stages, sometimes all but one of them, and injects faults; quiet: injects none."""
        draw = self.random
        if len(left) > 1 and not quiet and draw.random() < 0.15:
            left = draw.sample(left, len(left) - 1)
            self.faults["left out"] += 1
        saved = [stage for stage in left if _newest(stage)]
        if saved and not quiet and draw.random() < 0.3:
            damaged = draw.choice(saved)
            self.faults[damage(damaged.directory, draw)] += 1
            self.damaged.add(damaged.id)
        resumed = {stage.id: _newest(stage) for stage in left if stage.id not in self.damaged}
        ending = "none" if quiet else self.next_ending()
        plan = self.plan(ending, draw.choice(left), quiet)
        pipe = self.hide_video() if ending == "hanging video" else None
        for note in self.notes.iterdir():
            note.unlink()
        paths = [write_stage(_with_timeout(stage, 5.0 if pipe else 120.0)) for stage in left]
        killed_after = draw.uniform(0.5, 6.0 + 2.0 * len(left)) if ending == "kill at any time" else None
        codes = self.attempt(paths, plan, killed_after)
        if pipe:
            self.give_back(pipe)
        full = bool(plan.ballast and plan.ballast.exists())
        if plan.ballast and full:
            plan.ballast.unlink()
            self.faults["full disk"] += 1
        self.faults["USR1"] += plan.asked in self.made(plan.stage)
        self.settle(left, ending, codes, full)
        self.check_steady(resumed)
        self.damaged -= {stage.id for stage in left if self.made(stage.id)}
        attempt = f"attempt {self.attempts} of {' '.join(stage.id for stage in left)}, {ending}"
        print(f"{attempt}: exit codes {codes}, {self.faults.total()} faults so far", flush=True)

    def settle(self, left: Sequence[Stage], ending: str, codes: list[int | None], full: bool) -> None:
        """Counts an attempt's faults; an attempt may end only as one of them explains."""
        given_up = full and set(codes) == {2}
        if codes != [0, 0] and not given_up and set(codes) != ENDINGS.get(ending):
            raise SystemExit(f"an attempt with {ending} ended with {codes}: {_output(left)}")
        if codes == [0, 0]:
            return  # it was complete before the fault came
        self.faults[ending] += 1
        self.lost[ending].append(sum(max(max(self.made(stage.id), default=0) - _newest(stage), 0) for stage in left))

    def check_steady(self, resumed: dict[str, int]) -> None:
        """Each stage whose checkpoints are good goes on from its newest one, and only its own bad updates repeat any.

        resumed: stage -> update of its newest checkpoint before the attempt.
        """
        for name, newest in resumed.items():
            updates = [newest, *self.made(name)]
            if name != GOES_BACK and any(update != before + 1 for before, update in pairwise(updates)):
                self.fail(f"{name} has lost updates for another's fault: {updates}")

    def made(self, name: str) -> list[int]:
        """The updates of a stage in the last attempt."""
        note = self.notes / name
        return [int(line) for line in note.read_text().split()] if note.exists() else []

    def next_ending(self) -> str:
        self.endings = self.endings or self.random.sample(list(ENDINGS), len(ENDINGS))
        return self.endings.pop()

    def plan(self, ending: str, stage: Stage, quiet: bool) -> Plan:
        """The faults of an attempt, at an update of this stage."""
        draw, plan = self.random, Plan(self.notes, stage=stage.id)
        if quiet:
            return plan
        settings = stage.recipe.optimization
        total = settings.epochs * steps_per_epoch(len(self.data.videos) + 2, settings.global_batch)
        soon = [min(_newest(stage) + draw.randint(1, 2 * stage.execution.checkpoint_every), total) for _ in range(2)]
        both, one = (0, 1), (draw.randrange(2),)
        plan = plan._replace(ranks=one, update=max(soon))
        if self.mounted and draw.random() < 0.2:
            plan = plan._replace(ballast=self.disk / "ballast")
        if draw.random() < 0.2:
            plan = plan._replace(asked=min(soon))
        if draw.random() < 0.3:
            plan = plan._replace(flaky=draw.randrange(5))
            self.faults["failing reads"] += 1
        numbers = {"USR2": signal.SIGUSR2, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
        if ending in numbers:
            return plan._replace(ending="signal", ranks=draw.choice([both, one]), number=numbers[ending])
        if ending in ("kill one", "kill both"):
            return plan._replace(ending="signal", ranks=one if ending == "kill one" else both, number=signal.SIGKILL)
        if ending == "kill in a save":
            return plan._replace(ending="save", number=draw.randint(1, 8))
        return plan._replace(ending="loader" if ending == "kill a loader" else "none")

    def attempt(self, paths: Sequence[Path], plan: Plan, seconds: float | None = None) -> list[int | None]:
        """Runs both processes to their end, or kills them after so many seconds; returns their exit codes."""
        self.attempts += 1
        port = _free_port()
        context = multiprocessing.get_context("fork")  # the imports, which take longest, are done once
        processes = [context.Process(target=be, args=(rank, port, paths, plan)) for rank in range(2)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + (300 if seconds is None else seconds)
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 20)  # as SLURM's kill-on-bad-exit
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
        return [process.exitcode for process in processes]

    def hide_video(self) -> Path:
        """Replaces a video with a pipe that nobody writes to."""
        video = self.data.videos.pop(self.random.randrange(len(self.data.videos)))
        video.rename(video.with_suffix(".hidden"))
        os.mkfifo(video)
        return video

    @staticmethod
    def give_back(video: Path) -> None:
        video.unlink()
        video.with_suffix(".hidden").rename(video)

    def report(self, seconds: float) -> str:
        lines = [f"{self.faults.total()} faults in {self.runs} runs and {self.attempts} attempts, {seconds:.0f} s"]
        for name in (*ENDINGS, *DAMAGES, *NUISANCES):
            lost = self.lost.get(name)
            cost = f", updates lost {statistics.mean(lost):.1f} (most {max(lost)})" if lost else ""
            lines.append(f"  {name}: {self.faults[name]}{cost}")
        return "\n".join([*lines, "all weights are equal to the undisturbed run's, bit for bit"])


def _newest(stage: Stage) -> int:
    return max((int(path.parent.name[5:]) for path in stage.directory.glob(f"checkpoints/*/{MANIFEST}")), default=0)


def _output(stages: Sequence[Stage]) -> str:
    return "\n".join(path.read_text()[-6000:] for stage in stages for path in sorted(stage.directory.glob("output.*")))


def _with_timeout(stage: Stage, seconds: float) -> Stage:
    faults = dataclasses.replace(stage.execution.faults, video_seconds=seconds)
    return dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, faults=faults))


def _mount(folder: Path, megabytes: int) -> bool:
    """A small disk in memory; if that is not allowed, an ordinary folder, whose disk is not filled."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="how many at least (50)")
    parser.add_argument(
        "--group", type=int, choices=(1, 2, 3), default=1, help="students that share their teachers (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which storm (0)")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mvd-storm-") as name:
        storm = Storm(Path(name), arguments.seed, arguments.group)
        try:
            storm.disturb(arguments.faults)
        finally:
            storm.close()
    print(storm.report(time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
