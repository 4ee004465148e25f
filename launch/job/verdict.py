"""Why the processes of a job ended, from what they, SLURM and srun say."""

import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.job.disk import try_to
from launch.job.record import Attempt, Member
from launch.slurm.client import slurm
from mvd.distributed.blame import SIGNALS, hardware_fault
from mvd.distributed.exit_codes import STOPPED
from mvd.distributed.faults import record_fault
from mvd.run_directory import RunDirectory

MAX_FAILED_ATTEMPTS = 3  # in a row, with nothing new saved
SIGNAL_SECONDS = 60  # by which SLURM may send the signal before a time limit earlier than it was asked to
KILLED_BY_USR2, KILLED_BY_TERM = 128 + signal.SIGUSR2, 128 + signal.SIGTERM  # before a process could handle them
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
# A node that is gone, before SLURM has noticed: `srun: error: Task launch for StepId=24.1 failed on node node3: ...`.
_UNREACHABLE = re.compile(r"^srun: error: Task launch for \S+ failed on node ([\w.-]+): (.+)$", re.MULTILINE)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


class DeadTask(NamedTuple):
    """A task that a signal ended: its host, its rank (the lowest, if several of the host ended so) and the signal."""

    host: str
    rank: int
    signal: int


def judge(members: Sequence[Member], code: int) -> None:
    """Says in the first stage's record why the attempt ended, and whether that is the end of all its stages."""
    files, record = members[0]
    attempt, failure = record.attempts[-1], _failure(members)
    attempt.stopped = _was_stopped(record.job_id, code, failure)
    crash = try_to("log", lambda: blame_dead_tasks(files.whole, record.log))  # the others' errors only follow from it
    said = crash or (failure["lines"] if failure else _last_fault(members, attempt.started))
    attempt.error = _reason(code, said, explain_exit(code, step_state(record.log())))
    if failure and failure.get("final") and not attempt.shrunk_to:  # the memory may be enough for all processes
        record.error = attempt.error
    elif (failed := without_progress(members)) >= MAX_FAILED_ATTEMPTS and not attempt.stopped:
        record.error = f"{failed} attempts have saved nothing new; the last one: {attempt.error}"


def judge_time_limit(members: Sequence[Member], seconds_left: float) -> None:
    """Gives up a job that saves nothing between its start and its time limit, however often it is requeued.

    seconds_left: until the time limit, when an attempt has ended that was told to stop.
    """
    for _, record in members:
        attempt = record.attempts[-1]
        attempt.at_limit = attempt.stopped and seconds_left <= record.warning_seconds + SIGNAL_SECONDS
    count = min(sum(attempt.at_limit for attempt in since) for since in _since_progress(members))
    if attempt.at_limit and count >= MAX_FAILED_ATTEMPTS:
        members[0].record.error = (
            f"{count} attempts have come to their time limit without saving anything new; raise "
            "slurm.time_limit_hours or, if the log says that a save has failed, make room on the disk; then submit the "
            "row again"
        )


def without_progress(members: Sequence[Member]) -> int:
    """How many attempts have failed since anything new was saved of any stage."""
    return min(sum(bool(a.ended) and not a.stopped for a in since) for since in _since_progress(members))


def _since_progress(members: Sequence[Member]) -> list[list[Attempt]]:
    """Each stage's attempts since anything new was saved of it."""
    saved = [try_to("checkpoints", files.progress) for files, _ in members]
    return [
        [attempt for attempt in record.attempts if attempt.saved == latest]
        for (_, record), latest in zip(members, saved, strict=True)
    ]


def _was_stopped(job: str, code: int, failure: dict[str, Any] | None) -> bool:
    """Whether the attempt ended because of a signal from outside.

    USR2 always comes from there; TERM also from srun, which ends a step with it once a process of it has died.
    """
    signal_name = failure.get("signal") if failure else None
    if code in (0, KILLED_BY_USR2) or signal_name == "SIGUSR2":
        return True
    by_term = signal_name == "SIGTERM" or (failure is None and code in (STOPPED, KILLED_BY_TERM))
    return by_term and slurm.is_preempted(job)


def explain_exit(code: int, state: str) -> str:
    """Why the processes of a job ended if none recorded an error, in a sentence.

    code: of srun. state: SLURM's word for the end of the step or of the job, such as OUT_OF_MEMORY, from `step_state`
    or from accounting; "" if it is not known.
    """
    verdict = VERDICTS.get(state.partition(" ")[0])  # CANCELLED by 1000
    if verdict is not None:
        return f"no process reported an error; SLURM reports {state}: {verdict}"
    number = code - 128
    if number == signal.SIGKILL:
        return (
            "no process reported an error; SIGKILL is sent by the kernel if a host runs out of memory, or by a person"
        )
    if number in signal.valid_signals():
        name = signal.Signals(number).name
        return f"no process reported an error; it was killed by {name} ({signal.strsignal(number)})"
    return "no process reported an error"


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
    """Records the hosts where a hardware fault ended a task, or none could be started; says which, if any.

    A fault that CUDA or NCCL finds in a thread of its own aborts the process: then the rank's log says what it was.

    log: the path of each rank's log; srun and the batch script write to that of rank 0.
    """
    messages = []
    printed = _tail(log(0))
    for host, reason in dict(_UNREACHABLE.findall(printed)).items():
        messages.append(f"srun could not start a process on {host}: {reason}")
        record_fault(files, "launch", messages[-1], hosts=[host])
    for task in dead_tasks(printed):
        fault = SIGNALS.get(task.signal)
        if task.signal == signal.SIGABRT:
            fault = hardware_fault(_tail(log(task.rank)))
        if fault is not None:
            messages.append(f"rank {task.rank} on {task.host}: {fault}")
            record_fault(files, "hardware", messages[-1], hosts=[task.host])
    return "; ".join(messages) or None


def _failure(members: Sequence[Member]) -> dict[str, Any] | None:
    """What the first failing process recorded, if it could."""
    for files, _ in members:
        try:
            failure: dict[str, Any] = json.loads(files.error.read_text())
            return failure
        except (OSError, ValueError):  # ValueError: a full disk has cut it off
            continue
    return None


def _last_fault(members: Sequence[Member], since: str) -> str | None:
    """What training itself recorded last in this attempt, such as which host hung."""
    faults = [fault for files, _ in members for fault in try_to("faults.jsonl", files.whole.read_faults) or []]
    recent = sorted((fault for fault in faults if fault["time"] >= since), key=lambda fault: str(fault["time"]))
    return recent[-1]["message"] if recent else None


def _reason(code: int, said: str | None, exit_reason: str) -> str:
    if code == 0:
        return "stopped before a time limit or a preemption, or on request"
    killed = f", signal {code - 128}" if 128 < code < 160 else ""
    why = f"\n{said}" if said else f"; {exit_reason}"
    return f"a process ended with exit code {code}{killed}{why}"


def _tail(path: Path) -> str:
    """The end of a log, from the last line of launch.job on: what the last attempt printed."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return handle.read().decode(errors="replace").rpartition("\n=== ")[2]
    except OSError:  # a rank that died early has no log
        return ""
