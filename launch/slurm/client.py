"""The one door to SLURM: every client command, sbatch included, is run here.

What a shell has set for SLURM's own clients (SQUEUE_STATES, SBATCH_PARTITION, SLURM_CPU_BIND, ...) would change what
they do or print, so they run without it: the cluster profile is what counts. Answers are read in formats of our own;
other lines, such as a site's notices, are ignored.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.slurm.jobs import EndedJob, QueuedJob
from mvd.config import ConfigError

SECONDS_TO_ANSWER = 30
BRIEF = (1.0, 3.0)  # pauses in seconds between tries, for a command that a person waits for
PATIENT = (2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 60.0, 60.0, 60.0)  # for a job, which may outlast a controller's restart
NO_CLIENT = 127

KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}  # which cluster to talk to, and as whom
DROPPED = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SACCT_", "SRUN_", "SALLOC_", "SCANCEL_", "SINFO_", "MASTER_")
# Errors of SLURM's clients that go away by themselves: slurmctld, its network or munge does not answer.
PASSING = re.compile(
    r"timed out|unable to contact|connection (refused|reset|timed)|zero bytes|temporarily|communication|standby|"
    r"not respond|did not answer|transport|protocol authentication|munge|no route|socket|try again|connect failure",
    re.IGNORECASE,
)
QUEUE_FIELDS = {
    "JOBID": "%i",
    "STATE": "%T",
    "REASON": "%r",
    "TIME": "%M",
    "TIME_LEFT": "%L",
    "NODELIST": "%N",
    "WORK_DIR": "%Z",
}
HISTORY_FIELDS = ("JobID", "State", "WorkDir")
JOB_ID = re.compile(r"\d+(_\d+)?")
SUBMITTED = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S+)?")


class Answer(NamedTuple):
    """What a client command printed and its exit code."""

    code: int
    out: str = ""
    error: str = ""

    @property
    def passing(self) -> bool:
        """True if the command failed for a reason that goes away by itself."""
        return self.code not in (0, NO_CLIENT) and PASSING.search(self.error) is not None

    @property
    def message(self) -> str:
        """The error in one line; empty if there is none."""
        return (" ".join(self.error.split()) or f"exit code {self.code}") if self.code else ""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those by which a shell, or the job that this runs in, directs SLURM's clients."""
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(DROPPED)}


def run_client(command: Sequence[str]) -> Answer:
    """Runs a client command in a clean environment; one that is missing, or does not answer, is an Answer too."""
    try:
        done = subprocess.run(
            command,
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(1, error=f"{command[0]} did not answer within {SECONDS_TO_ANSWER} s")
    except OSError as error:
        return Answer(NO_CLIENT, error=f"{command[0]} cannot be run: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr)


class SlurmClient:
    """Asks SLURM, one method per question; failures that go away by themselves are retried after `pauses`."""

    call = staticmethod(run_client)
    sleep = staticmethod(time.sleep)

    def __init__(self, pauses: Sequence[float] = BRIEF) -> None:
        self.pauses = pauses
        self._config: dict[str, str] | None = None  # does not change while a command runs

    def has(self, command: str) -> bool:
        """Whether this machine has a client command."""
        return shutil.which(command) is not None

    def is_available(self) -> bool:
        """Whether jobs can be submitted from this machine."""
        return self.has("sbatch")

    def require(self, instead: str) -> None:
        """Raises ConfigError if jobs cannot be submitted from this machine. instead: what the user can do here."""
        if not self.is_available():
            raise ConfigError(f"there is no sbatch on this machine; log in to the cluster, or {instead}")

    def queue(self, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
        """Those of these jobs that are in the queue; `24` stands for every element of an array, `24_3` for one.

        Raises:
            ConfigError: squeue does not answer.
        """
        wanted = {job_id for job_id in job_ids if JOB_ID.fullmatch(job_id)}
        if not wanted:
            return {}
        found = self._squeue("--jobs", _roots(wanted))
        return {job: entry for job, entry in found.items() if job in wanted or _root(job) in wanted}

    def queued_in(self, directory: Path) -> set[str]:
        """Ids, without array indices, of this user's queued jobs that have this working directory.

        Raises:
            ConfigError: squeue does not answer.
        """
        found = self._squeue("--user", str(os.getuid()))
        return {_root(job) for job, entry in found.items() if entry.directory == str(directory)}

    def history(self, job_ids: Iterable[str]) -> dict[str, EndedJob]:
        """Those of these jobs that accounting knows; empty if there is no accounting or it does not answer."""
        wanted = {job_id for job_id in job_ids if JOB_ID.fullmatch(job_id)}
        if not wanted:
            return {}
        fields = ",".join(HISTORY_FIELDS)
        answer = self._ask("sacct", "--parsable2", "--allocations", "--jobs", _roots(wanted), "--format", fields)
        rows = _rows(answer.out, HISTORY_FIELDS, "") or []
        return {job: EndedJob(state.split()[0], directory) for job, state, directory in rows if state.strip()}

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Cancels jobs, queued or running.

        Raises:
            ConfigError: scancel fails.
        """
        answer = self._ask("scancel", *job_ids)
        if answer.code:
            raise ConfigError(f"scancel failed ({answer.message}); try again")

    def start_now(self, job_id: str) -> str:
        """Lets a job start although those it waits for go on; returns SLURM's error, "" if there is none."""
        return self._ask("scontrol", "update", f"JobId={job_id}", "Dependency=").message

    def ask_to_save(self, job_id: str) -> str:
        """Has a running job's processes save and go on; returns SLURM's error, "" if there is none."""
        return self._ask("scancel", "--signal=USR1", job_id).message

    def requeue(self, job_id: str) -> str:
        """Puts a running job back into the queue under its id; returns SLURM's error, "" if there is none."""
        return self._ask("scontrol", "requeue", job_id).message

    def is_preempted(self, job_id: str) -> bool:
        """Whether SLURM has told a job to make room for another one; False if scontrol does not answer."""
        answer = self._ask("scontrol", "--oneliner", "show", "job", job_id)
        times = [word.partition("=")[2] for word in answer.out.split() if word.startswith("PreemptTime=")]
        return any(text not in ("None", "Unknown", "N/A", "") for text in times)

    def exclude(self, job_id: str, nodes: str) -> str:
        """Changes the nodes that a waiting job excludes; returns SLURM's error, "" if there is none."""
        return self._ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={nodes}").message

    def resize(self, job_id: str, nodes: int) -> str:
        """Sets the number of nodes that a waiting job asks for: SLURM lowers it if a node of the job is lost."""
        return self._ask("scontrol", "update", f"JobId={job_id}", f"NumNodes={nodes}").message

    def hostnames(self, nodes: str) -> list[str]:
        """The nodes of a list such as `node[1-3,7]`.

        Raises:
            ConfigError: this machine has no scontrol.
        """
        answer = self._ask("scontrol", "show", "hostnames", nodes)
        if answer.code:
            raise ConfigError(f"scontrol show hostnames {nodes} failed ({answer.message})")
        return answer.out.split()

    def steps(self, job_id: str, but: str) -> list[str]:
        """Ids of a running job's steps, without its batch script and the steps of the name `but`; none if not known."""
        answer = self._ask("squeue", "--steps", "--noheader", "--jobs", job_id, "--format", "mvd|%i|%j")
        found = [line.strip().split("|", 2) for line in answer.out.splitlines() if line.strip().startswith("mvd|")]
        return [step for _, step, name in found if name != but and step.rpartition(".")[2].isdigit()]

    def kill_steps(self, steps: Iterable[str]) -> None:
        """Sends SIGKILL to the processes of steps; whether it has come to them, `steps` says later."""
        self._ask("scancel", "--signal=KILL", *steps)

    def exclusion_error(self, script: Path, nodes: str) -> str:
        """Why a batch script could not run without these nodes, in SLURM's words; "" if it can."""
        excluded = [f"--exclude={nodes}"] if nodes else []
        return self._ask("sbatch", "--test-only", *excluded, str(script)).message

    def submit(self, script: Path, directory: Path) -> str:
        """Submits a batch script; returns the job id, which is the whole array's if it asks for one.

        directory: the working directory that the script asks for, which no other submission has. By it a job is found
        that was submitted although sbatch's answer was lost or unreadable.

        Raises:
            SubmissionError: sbatch fails, with its own message.
        """
        for tries, pause in enumerate((*self.pauses, None)):
            answer = self.call(("sbatch", "--parsable", str(script)))
            ids = {match[1] for line in answer.out.splitlines() if (match := SUBMITTED.fullmatch(line.strip()))}
            if answer.code == 0 and len(ids) == 1:
                job = ids.pop()
                if tries:
                    self._cancel_others(directory, job)
                return job
            found = self.queued_in(directory) if answer.code == 0 or answer.passing else set()
            if found:
                return min(found, key=int)
            if not answer.passing or pause is None:
                break
            self.sleep(pause)
        raise SubmissionError(answer.error or f"sbatch printed no job id: {' '.join(answer.out.split())!r}")

    def _cancel_others(self, directory: Path, job: str) -> None:
        """Cancels what an earlier call of sbatch has submitted after all, later than squeue was asked."""
        with contextlib.suppress(ConfigError):  # such a job has no record, and so ends by itself
            others = self.queued_in(directory) - {job}
            if others:
                self.cancel(others)

    def config(self) -> dict[str, str]:
        """`scontrol show config` by name, such as MaxArraySize; empty if scontrol does not answer."""
        if self._config is None:
            answer = self._ask("scontrol", "show", "config")
            pairs = (line.partition("=") for line in answer.out.splitlines())
            self._config = {name.strip(): value.strip() for name, sign, value in pairs if sign and not answer.code}
        return self._config

    def largest_array(self) -> int | None:
        """The most elements that an array may have; None if SLURM does not say."""
        size = self.config().get("MaxArraySize", "")
        return max(int(size), 1) if size.isdigit() else None

    def requeue_exit(self) -> int | None:
        """An exit code after which SLURM requeues a job by itself (RequeueExit); None if there is none."""
        codes = re.findall(r"\d+", self.config().get("RequeueExit", ""))
        return int(codes[0]) if codes else None

    def _squeue(self, *selection: str) -> dict[str, QueuedJob]:
        prefix = "mvd|"
        columns = prefix + "|".join(QUEUE_FIELDS.values())
        answer = self._ask("squeue", "--array", "--format", columns, *selection)
        if answer.code and "invalid job id" in answer.error.lower():  # what it says of a single job that is long over
            return {}
        rows = _rows(answer.out, tuple(QUEUE_FIELDS), prefix)
        if answer.code or rows is None:
            raise ConfigError(f"squeue does not answer ({answer.message or 'no table'}); try again when SLURM is back")
        return {job: QueuedJob(*cells) for job, *cells in rows}

    def _ask(self, *command: str) -> Answer:
        for pause in self.pauses:
            answer = self.call(command)
            if not answer.passing:
                return answer
            self.sleep(pause)
        return self.call(command)


class SubmissionError(ConfigError):
    """sbatch did not take a script; the text is sbatch's own."""


def _rows(text: str, header: tuple[str, ...], prefix: str) -> list[list[str]] | None:
    """The lines of a table of jobs; None if its header is missing, since then something else has answered."""
    lines = [line.strip().removeprefix(prefix) for line in text.splitlines() if line.strip().startswith(prefix)]
    if "|".join(header) not in lines:
        return None
    rows = (line.split("|", len(header) - 1) for line in lines)
    return [row for row in rows if len(row) == len(header) and JOB_ID.fullmatch(row[0])]


def _root(job_id: str) -> str:
    return job_id.partition("_")[0]


def _roots(job_ids: Iterable[str]) -> str:
    return ",".join(sorted({_root(job_id) for job_id in job_ids}))


slurm = SlurmClient()  # of this process
