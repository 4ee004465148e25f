"""SLURM's client commands, stood in for: a site's answer is one line of a test. tests/slurm asks a real SLURM."""

from collections import defaultdict
from collections.abc import Sequence

import pytest

from launch.slurm.client import BRIEF, HISTORY_FIELDS, QUEUE_FIELDS, Answer, SlurmClient, slurm

BUSY = "slurm_load_jobs error: Socket timed out on send/recv operation"


class FakeSlurm:
    """Answers commands as SLURM's clients do, from what a test has set; the fixture `fake_slurm` installs it.

    queue: job id -> (state, reason, elapsed time, time left, nodes, working directory). history: job id -> (state,
    working directory). missing: commands that this machine lacks. steps: those of a running job. calls: the commands so
    far. pauses: how long the client waited between its tries, in seconds.
    """

    def __init__(self) -> None:
        self.queue: dict[str, tuple[str, ...]] = {}
        self.history: dict[str, tuple[str, str]] = {}
        self.config = {"MaxArraySize": "1001", "RequeueExit": "(null)"}
        self.calls: list[tuple[str, ...]] = []
        self.pauses: list[float] = []
        self.next_job = 100
        self.missing: set[str] = set()
        self.steps: list[str] = []
        self._scripted: dict[str, list[Answer]] = defaultdict(list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the commands in this process."""
        monkeypatch.setattr(SlurmClient, "call", self)
        monkeypatch.setattr(SlurmClient, "sleep", staticmethod(self.pauses.append))
        monkeypatch.setattr(SlurmClient, "has", lambda _, command: command not in self.missing)
        monkeypatch.setattr(slurm, "pauses", BRIEF)
        monkeypatch.setattr(slurm, "_config", None)

    def runs(
        self,
        job: str,
        state: str = "RUNNING",
        reason: str = "None",
        directory: str = "",
        left: str = "20:40:00",
        nodes: str = "node1",
    ) -> None:
        """Puts a job into the queue."""
        self.queue[job] = (state, reason, "3:20:00" if state == "RUNNING" else "0:00", left, nodes, directory)

    def says(self, command: str, out: str = "", error: str = "", code: int = 0, times: int = 1) -> None:
        """The next answers of a command, such as `squeue` or `scontrol requeue`."""
        self._scripted[command] += [Answer(code, out, error)] * times

    def fails(self, command: str, error: str = BUSY, times: int = 1) -> None:
        """The next answers of a command are this error."""
        self.says(command, error=error, code=1, times=times)

    def called(self, command: str) -> list[tuple[str, ...]]:
        """The calls of a command, in order."""
        return [call for call in self.calls if _name(call) == command]

    def __call__(self, command: Sequence[str]) -> Answer:
        call = tuple(command)
        self.calls.append(call)
        scripted = self._scripted[_name(call)]
        if scripted:
            return scripted.pop(0)
        answer = getattr(self, f"_{_name(call).replace(' ', '_')}", None)
        return answer(call) if answer else Answer(0)

    def table(self) -> str:
        """What squeue prints."""
        rows = [(job, *cells) for job, cells in self.queue.items()]
        return "".join("mvd|" + "|".join(row) + "\n" for row in [tuple(QUEUE_FIELDS), *rows])

    def _squeue(self, call: tuple[str, ...]) -> Answer:
        return Answer(0, "".join(f"mvd|{step}|python\n" for step in self.steps) if "--steps" in call else self.table())

    def _scontrol_show_hostnames(self, call: tuple[str, ...]) -> Answer:
        prefix, _, numbers = call[-1].rstrip("]").partition("[")
        return Answer(0, "\n".join(prefix + number for number in numbers.split(",")) if numbers else call[-1])

    def _scancel(self, _: tuple[str, ...]) -> Answer:
        self.steps.clear()
        return Answer(0)

    def _sacct(self, _: tuple[str, ...]) -> Answer:
        rows = [HISTORY_FIELDS, *((job, state, folder) for job, (state, folder) in self.history.items())]
        return Answer(0, "".join("|".join(row) + "\n" for row in rows))

    def _sbatch(self, _: tuple[str, ...]) -> Answer:
        self.next_job += 1
        return Answer(0, f"{self.next_job}\n")

    def _scontrol_show_config(self, _: tuple[str, ...]) -> Answer:
        lines = [f"{name:<24}= {value}" for name, value in self.config.items()]
        return Answer(0, "\n".join(["Configuration data as of 2026-11-25T01:00:00", *lines, ""]))


def _name(call: tuple[str, ...]) -> str:
    """`squeue`, `sbatch --test-only`, `scontrol requeue`, `scontrol show config`, ..."""
    if call[0] == "sbatch" and "--test-only" in call:
        return "sbatch --test-only"
    words = [word for word in call if not word.startswith("-")]
    return " ".join(words[: {"scontrol": 3 if "show" in words else 2}.get(call[0], 1)])
