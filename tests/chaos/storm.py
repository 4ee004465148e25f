"""A seeded storm of faults over a real run of two processes, which must end as the undisturbed run does.

    python -m tests.chaos.storm --faults 50 --seed 0

Fine-tuning runs, with drop path, dropout, mixing, two broken videos and one update whose loss is not a number, are
killed, signalled, deprived of checkpoints and of disk space, and started again until they are complete. Then their
weights must equal those of an undisturbed run that skips the same update, bit for bit.
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
from pathlib import Path

from safetensors.torch import load_file

from launch.local.processes import _free_port
from mvd.config.run_settings import DatasetPaths, Faults
from mvd.data.synthetic_motion import generate_motion
from mvd.distributed.exit_codes import RETRYABLE, STOPPED
from mvd.files import write_json
from mvd.run_directory import MANIFEST
from mvd.stage import Stage
from tests.chaos.damage import DAMAGES, damage
from tests.chaos.victim import NAN_AT, Plan, be
from tests.runs import small_stage, write_stage

EPOCHS = 4
UPDATES = 6 * EPOCHS
SAVED_EVERY = 3
MEGABYTES = 64  # of the disk that becomes full
ENDINGS = {  # how an attempt may end: the exit codes of the two processes, none of them 0
    "USR2": {STOPPED},
    "TERM": {STOPPED},
    "INT": {STOPPED},
    "kill one": {RETRYABLE, -signal.SIGKILL},  # the other one leaves by itself
    "kill both": {-signal.SIGKILL},
    "kill in a save": {RETRYABLE, -signal.SIGKILL},
    "kill at any time": {-signal.SIGKILL},
    "hanging video": {RETRYABLE},
}
NUISANCES = ("full disk", "failing reads", "NaN")


class Storm:
    """The faults to come, those that came, and what they cost."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.disk = folder / "disk"
        self.mounted = _mount(self.disk)
        self.faults: Counter[str] = Counter()
        self.lost: dict[str, list[int]] = defaultdict(list)  # updates to repeat, by what ended the attempt
        self.attempts = self.runs = 0
        self.root = generate_motion(folder / "motion", train=48, val=16)
        lines = (self.root / "train.csv").read_text().splitlines()
        for place in (0, -1):
            (folder / f"broken{place}.mp4").write_bytes(b"no video")
            lines[place] = f"{folder}/broken{place}.mp4 0"
        (folder / "train.csv").write_text("\n".join(lines) + "\n")
        self.videos = [self.root / line.rpartition(" ")[0] for line in lines[1:-1]]

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)  # a process may still hold a file of it

    def stage(self, runs: Path) -> Stage:
        """The run that is disturbed."""
        return small_stage(
            "finetune",
            "finetune",
            runs,
            DatasetPaths(root=str(self.root), train=str(self.folder / "train.csv")),
            epochs=EPOCHS,
            schedule_epochs=EPOCHS,
            drop_path=0.3,
            head_dropout=0.3,
            workers=1,
            checkpoint_every=SAVED_EVERY,
            log_every=2,
            faults=Faults(unreadable_share=0.1, save_failures=12, save_again_seconds=1),
        )

    def undisturbed(self) -> dict:
        """The weights that every run must end with."""
        stage = self.stage(self.folder / "undisturbed")
        path = write_stage(stage)
        write_json(stage.directory / "skipped.json", {"skipped": [NAN_AT], "rollbacks": []})
        codes = self.attempt(path, Plan(update=-1))
        if codes != [0, 0]:
            raise SystemExit(f"the undisturbed run ended with {codes}: {_output(stage)}")
        return load_file(stage.directory / "weights.safetensors")

    def disturb(self, faults: int) -> None:
        """Disturbs run after run until so many faults have come."""
        expected = self.undisturbed()
        while self.faults.total() < faults:
            self.runs += 1
            stage = self.stage(self.disk / "runs")
            shutil.rmtree(self.disk / "runs", ignore_errors=True)
            path = write_stage(stage)
            while not (stage.directory / "result.json").exists():
                quiet = self.faults.total() >= faults
                self.one_attempt(stage, path, quiet)
            self.faults["NaN"] += 1
            weights = load_file(stage.directory / "weights.safetensors")
            wrong = [name for name in expected if not weights[name].equal(expected[name])]
            print(f"run {self.runs} is complete: {self.faults.total()} faults, {len(wrong)} tensors differ", flush=True)
            if wrong:
                evidence = tempfile.mkdtemp(prefix="mvd-storm-evidence-")
                shutil.copytree(self.folder, evidence, dirs_exist_ok=True)
                raise SystemExit(f"{len(wrong)} tensors of the weights differ; both runs are in {evidence}")

    def one_attempt(self, stage: Stage, path: Path, quiet: bool) -> None:
        draw = self.random
        before = _newest(stage)
        if not quiet and before and draw.random() < 0.3:
            self.faults[damage(stage.directory, draw)] += 1
        resumed = _newest(stage)
        ending = "none" if quiet else draw.choice(list(ENDINGS))
        plan = self.plan(ending, resumed)
        full = not quiet and self.mounted and draw.random() < 0.2
        if full:
            plan = plan._replace(ballast=self.disk / "ballast")
        if not quiet and draw.random() < 0.3:
            plan = plan._replace(flaky=draw.randrange(5))
            self.faults["failing reads"] += 1
        pipe = self.hide_video() if ending == "hanging video" else None
        (stage.directory / "updates").unlink(missing_ok=True)
        limit = 5.0 if pipe else 120.0
        faults = dataclasses.replace(stage.execution.faults, video_seconds=limit)
        execution = dataclasses.replace(stage.execution, faults=faults)
        write_stage(dataclasses.replace(stage, execution=execution))
        codes = self.attempt(path, plan, draw.uniform(0.5, 8.0) if ending == "kill at any time" else None)
        if pipe:
            self.give_back(pipe)
        if full and (self.disk / "ballast").exists():
            (self.disk / "ballast").unlink()
            self.faults["full disk"] += 1
        self.settle(stage, ending, codes, full)
        print(f"attempt {self.attempts}, {ending}: exit codes {codes}, {self.faults.total()} faults so far", flush=True)

    def settle(self, stage: Stage, ending: str, codes: list[int | None], full: bool) -> None:
        """Counts an attempt's faults; an attempt may end only as one of them explains."""
        given_up = full and set(codes) == {2}
        if codes != [0, 0] and not given_up and set(codes) != ENDINGS.get(ending):
            raise SystemExit(f"an attempt with {ending} ended with {codes}: {_output(stage)}")
        if codes == [0, 0]:
            return  # it was complete before the fault came
        self.faults[ending] += 1
        log = stage.directory / "updates"
        done = int(log.read_text().split()[-1]) if log.exists() else _newest(stage)
        self.lost[ending].append(max(done - _newest(stage), 0))

    def plan(self, ending: str, resumed: int) -> Plan:
        draw = self.random
        update = min(resumed + draw.randint(1, 2 * SAVED_EVERY), UPDATES)
        both, one = (0, 1), (draw.randrange(2),)
        numbers = {"USR2": signal.SIGUSR2, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
        if ending in numbers:
            return Plan("signal", draw.choice([both, one]), update, numbers[ending])
        if ending in ("kill one", "kill both"):
            return Plan("signal", one if ending == "kill one" else both, update, signal.SIGKILL)
        if ending == "kill in a save":
            return Plan("save", one, update, draw.randint(1, 8))
        return Plan()

    def attempt(self, path: Path, plan: Plan, seconds: float | None = None) -> list[int | None]:
        """Runs both processes to their end, or kills them after so many seconds; returns their exit codes."""
        self.attempts += 1
        port = _free_port()
        context = multiprocessing.get_context("fork")  # the imports, which take longest, are done once
        processes = [context.Process(target=be, args=(rank, port, path, plan)) for rank in range(2)]
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
        video = self.videos.pop(self.random.randrange(len(self.videos)))
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


def _output(stage: Stage) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(stage.directory.glob("output.*")))


def _mount(folder: Path) -> bool:
    """A small disk in memory; if that is not allowed, an ordinary folder, whose disk is not filled."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="how many at least (50)")
    parser.add_argument("--seed", type=int, default=0, help="which storm (0)")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mvd-storm-") as name:
        storm = Storm(Path(name), arguments.seed)
        try:
            storm.disturb(arguments.faults)
        finally:
            storm.close()
    print(storm.report(time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
