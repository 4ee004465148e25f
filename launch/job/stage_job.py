"""What every process of a SLURM job runs: one stage, from whatever its run directory holds, or a share of preparing."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from launch.job.attempts import end_without_batch_script
from launch.job.log import say
from launch.job.record import now
from launch.job.students import leave_group
from launch.job.this_job import job_id, restarts, start
from launch.slurm.client import PATIENT, slurm
from mvd.config import ConfigError
from mvd.distributed.exit_codes import INVALID, RETRYABLE, STOPPED, leave
from mvd.files import DISK_FAULTS
from mvd.host import hostname
from mvd.owner import VARIABLE, Owner, lost_to, read_owner
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

ERROR_LINES = 5
SECONDS_FOR_OWNER = 120.0  # a network disk may show the record of the first node late


@dataclass(frozen=True)
class StageJob:
    """A stage, a shard of one, or students that share their teachers, for submitit to pickle.

    directories: of the stages, which have all of their state.
    """

    directories: Sequence[str]
    shard: int = 0

    def __call__(self) -> None:
        """Runs the stages in this process. Told to stop, it returns early: no result then means to go on later."""
        folders = [RunDirectory(Path(directory)) for directory in self.directories]
        if len(folders) == 1:
            folders = [self._stage(folders[0]).job_files]
        note = ErrorNote(folders, int(os.environ["SLURM_PROCID"]))
        for number in (signal.SIGUSR2, signal.SIGTERM):  # submitit's own would requeue in the middle of a step
            signal.signal(number, note.leave)
        say(f"=== job {job_id()}, rank {note.rank} on {hostname()}, {now()}")
        try:
            os.environ[VARIABLE] = f"{job_id()}.{restarts()}.{start()}"
            owner = wait_for_owner(folders)
            os.environ["MASTER_PORT"] = str(owner.port)
            chosen = [files for files in folders if files.path.name in owner.together.split(",")] or folders
            note.folders = chosen
            use_nodes_of_step()
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            export_job()
            run([self._stage(files) for files in chosen], note)
        except Exception:
            said = traceback.format_exc().strip()
            say(said)
            note.write("\n".join(said.splitlines()[-ERROR_LINES:]))
            leave(1)
        except SystemExit as exit:
            leave(int(exit.code or 0))
        if note.rank == 0 and not all(files.result.exists() for files in chosen):
            end_without_batch_script(folders)

    def _stage(self, files: RunDirectory) -> Stage:
        return Stage.from_yaml(files.whole.stage).in_shards()[self.shard]


@dataclass(frozen=True)
class PrepareJob:
    """A share of preparing a data set, number and count; its state is all in the data set's folder."""

    arguments: argparse.Namespace
    share: tuple[int, int]

    def __call__(self) -> None:
        """Does what is left of the share; if it fails, its exit code keeps the last job from starting."""
        from mvd.data.prepare.prepare import run as prepare

        signal.signal(signal.SIGUSR2, self.requeue)
        say(f"=== job {job_id()} on {hostname()}, {now()}")
        code = prepare(argparse.Namespace(**vars(self.arguments) | {"shard": self.share}))
        if code:
            sys.exit(code)

    def requeue(self, *_: object) -> None:
        """Handles SLURM's signal before a time limit or a preemption; submitit would ask scontrol only once."""
        slurm.pauses = PATIENT
        error = slurm.requeue(job_id())
        say(f"=== the job could not be requeued: {error}" if error else "=== requeued")
        os._exit(STOPPED)


def wait_for_owner(folders: Sequence[RunDirectory]) -> Owner:
    """What launch.job.attempts recorded of this attempt, in one of the folders at least.

    Raises:
        ConfigError: the run directories belong to another attempt.
    """
    own, deadline = os.environ[VARIABLE], time.monotonic() + SECONDS_FOR_OWNER
    while True:
        for files in folders:
            owner = read_owner(files)
            if owner is not None and owner.name == own:
                return owner
        if time.monotonic() > deadline:
            raise ConfigError(f"{folders[0].path} does not belong to job {own} but to {read_owner(folders[0])}")
        time.sleep(0.5)


def use_nodes_of_step() -> None:
    """Shows submitit the nodes that the processes run on as those of the job, which may have spare ones too."""
    for name in ("NODELIST", "NUM_NODES"):
        os.environ[f"SLURM_JOB_{name}"] = os.environ[f"SLURM_STEP_{name}"]


def export_job() -> None:
    """Tells training which hosts it has, and that it asked for GPUs unless the profile's environment says "0"."""
    os.environ["MVD_HOSTS"] = ",".join(JobEnvironment().hostnames)
    os.environ.setdefault("MVD_EXPECT_GPU", "1")


def run(stages: Sequence[Stage], note: "ErrorNote") -> None:
    """Imports torch, and trains or tests; exits with code 2 if another attempt would be no better."""
    from mvd.distributed.faults import HostFault, PeerLost, RunFailed
    from mvd.distributed.signals import Interrupted
    from mvd.run import run_group, run_stage

    try:
        if len(stages) == 1:
            run_stage(stages[0])
        else:
            run_group(stages, leave_group)
    except Interrupted as stop:
        say(stop)
    except (ConfigError, RunFailed) as error:
        say(f"error: {error}")
        note.write(f"error: {error}", final=True)
        sys.exit(INVALID)
    except (HostFault, PeerLost) as error:
        say(f"error: {error}")
        note.write(f"error: {error}")
        sys.exit(RETRYABLE)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        said = f"error: {error.filename or 'a file'}: {error.strerror}; fix that, then submit the row again"
        say(said)
        note.write(said)  # another attempt may find room on the disk, or another host
        sys.exit(INVALID)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass
class ErrorNote:
    """error.json, for launch.job.attempts; only the first process to fail writes it, since it makes the others fail.

    folders: of the stages of the job; it is in the first that is still this attempt's and has no result.
    """

    folders: Sequence[RunDirectory]
    rank: int

    def write(self, lines: str, final: bool = False, signal_name: str | None = None) -> None:
        """Records an error's last lines. final: another attempt would meet it too. signal_name: its cause, if any."""
        entry = {"rank": self.rank, "host": hostname(), "lines": lines, "final": final, "signal": signal_name}
        try:
            lost = {files: lost_to(files) for files in self.folders}
            own = [files for files in self.folders if lost[files] is None]
            if not own:
                say(lost[self.folders[0]])
                return
            with open(min(own, key=lambda files: files.result.exists()).error, "x") as handle:
                json.dump(entry, handle)
        except FileExistsError:
            say("another process has failed before this one")
        except (ConfigError, OSError) as error:
            say(f"{self.folders[0].error} cannot be written: {error}")

    def leave(self, number: int, _: object) -> None:
        """Handles a signal in the seconds before training, when nothing is lost by leaving at once."""
        name = signal.Signals(number).name
        self.write(f"told to stop by {name} while starting", signal_name=name)
        os._exit(STOPPED)
