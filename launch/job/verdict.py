"""Why the processes of a job ended, from what SLURM and srun say."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mvd.distributed.blame import SIGNALS, hardware_fault
from mvd.distributed.faults import record_fault
from mvd.run_directory import RunDirectory

TAIL_BYTES = 2**18
# State of a job's step, as `sacct --format State` shows it -> what it means and what to do.
VERDICTS = {
    "OUT_OF_MEMORY": "the job used more memory than it asked for; raise slurm.memory_gb, or lower workers",
    "NODE_FAIL": "a node of the job failed",
    "BOOT_FAIL": "a node of the job did not boot",
    "TIMEOUT": "the job reached its time limit before it had saved; raise slurm.warning_seconds",
    "DEADLINE": "the job reached its deadline",
    "PREEMPTED": "the job was preempted before it had saved; raise slurm.warning_seconds",
    "CANCELLED": "the job was cancelled",
}
_STEP_MESSAGES = {
    "OUT_OF_MEMORY": r"^slurmstepd: error: .*oom.kill event|^srun: error: .*: Out Of Memory$",
    "NODE_FAIL": r"^(slurmstepd|srun): error: .* (DUE TO NODE FAILURE|Node failure on )",
    "TIMEOUT": r"^slurmstepd: error: .* DUE TO TIME LIMIT",
    "PREEMPTED": r"^slurmstepd: error: .* DUE TO PREEMPTION",
}
# srun reports each task that died: `srun: error: node3: task 5: Bus error (core dumped)`.
_DEAD_TASK = re.compile(r"^srun: error: ([\w.-]+): tasks? ([\d,-]+): ([^(\n]+)", re.MULTILINE)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


class DeadTask(NamedTuple):
    """A task that a signal ended: its host, its rank (the lowest, if several of the host ended so) and the signal."""

    host: str
    rank: int
    signal: int


def explain_exit(code: int, state: str) -> str:
    """Why the processes of a job ended if none recorded an error, in a sentence.

    code: of srun. state: SLURM's word for the end of the step or of the job, such as OUT_OF_MEMORY, from `step_state`
    or from accounting; "" if it is not known.
    """
    verdict = VERDICTS.get(state.partition(" ")[0])  # CANCELLED by 1000
    if verdict is not None:
        return f"no process said why; SLURM says {state}: {verdict}"
    number = code - 128
    if number == signal.SIGKILL:
        return "no process said why; SIGKILL comes from the kernel if a host has no memory left, or from a person"
    if number in signal.valid_signals():
        return f"no process said why; it was killed by {signal.Signals(number).name} ({signal.strsignal(number)})"
    return "no process said why"


def step_state(log: Path) -> str:
    """How SLURM says that the processes of the last attempt ended, from the log of a batch script; "" if it does not.

    Accounting says the same, but later, and only if the site has it.
    """
    printed = _tail(log)
    return next((state for state, pattern in _STEP_MESSAGES.items() if re.search(pattern, printed, re.MULTILINE)), "")


def dead_tasks(log: str) -> list[DeadTask]:
    """The tasks that a signal ended, as srun reports them in the log of a batch script."""
    found = [(host, ranks, _SIGNALS.get(how.strip())) for host, ranks, how in _DEAD_TASK.findall(log)]
    return [DeadTask(host, int(re.split("[,-]", ranks)[0]), number) for host, ranks, number in found if number]


def blame_dead_tasks(files: RunDirectory, log: Callable[[int], Path]) -> str | None:
    """Records the hosts on which a hardware fault ended a task, for the next attempt to avoid; says which, if any.

    A fault that CUDA or NCCL finds in a thread of its own aborts the process: then the rank's log says what it was.

    log: the path of each rank's log; srun and the batch script write to that of rank 0.
    """
    messages = []
    for task in dead_tasks(_tail(log(0))):
        fault = SIGNALS.get(task.signal)
        if task.signal == signal.SIGABRT:
            fault = hardware_fault(_tail(log(task.rank)))
        if fault is not None:
            messages.append(f"rank {task.rank} on {task.host}: {fault}")
            record_fault(files, "hardware", messages[-1], hosts=[task.host])
    return "; ".join(messages) or None


def _tail(path: Path) -> str:
    """The end of a log, from the last line of launch.job on: what the last attempt printed."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return handle.read().decode(errors="replace").rpartition("\n=== ")[2]
    except OSError:  # a rank that died early has no log
        return ""
