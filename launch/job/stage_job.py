"""What every process of a SLURM job runs: one stage, from whatever its run directory holds, or a share of preparing."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from launch.job.attempts import end_without_batch_script, job_id, restarts, start
from launch.job.log import say
from launch.job.record import now
from launch.slurm.client import PATIENT, slurm
from mvd.config import ConfigError
from mvd.distributed.exit_codes import INVALID, RETRYABLE, STOPPED, leave
from mvd.host import hostname
from mvd.owner import VARIABLE, Owner, lost_to, read_owner
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

ERROR_LINES = 5
SECONDS_FOR_OWNER = 120.0  # a network disk may show the record of the first node late


@dataclass(frozen=True)
class StageJob:
    """A stage, or a shard of one, for submitit to pickle; its state is all in the run directory."""

    directory: str
    shard: int

    def __call__(self) -> None:
        """Runs the stage in this process. Told to stop, it returns early: no result then means to go on later."""
        stage = Stage.from_yaml(RunDirectory(Path(self.directory)).stage).in_shards()[self.shard]
        note = ErrorNote(stage.job_files, int(os.environ["SLURM_PROCID"]))
        for number in (signal.SIGUSR2, signal.SIGTERM):  # submitit's own would requeue in the middle of a step
            signal.signal(number, note.leave)
        say(f"=== job {job_id()}, rank {note.rank} on {hostname()}, {now()}")
        try:
            os.environ[VARIABLE] = f"{job_id()}.{restarts()}.{start()}"
            os.environ["MASTER_PORT"] = str(wait_for_owner(stage.job_files).port)
            use_nodes_of_step()
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            export_job()
            run(stage, note)
        except Exception:
            said = traceback.format_exc().strip()
            say(said)
            note.write("\n".join(said.splitlines()[-ERROR_LINES:]))
            leave(1)
        except SystemExit as exit:
            leave(int(exit.code or 0))
        if note.rank == 0 and not stage.job_files.result.exists():
            end_without_batch_script(stage.job_files)


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


def wait_for_owner(files: RunDirectory) -> Owner:
    """What launch.job.attempts recorded of this attempt.

    Raises:
        ConfigError: the run directory belongs to another attempt.
    """
    own, deadline = os.environ[VARIABLE], time.monotonic() + SECONDS_FOR_OWNER
    while (owner := read_owner(files)) is None or owner.name != own:
        if time.monotonic() > deadline:
            raise ConfigError(f"{files.path} does not belong to job {own} but to {owner or 'none'}")
        time.sleep(0.5)
    return owner


def use_nodes_of_step() -> None:
    """Shows submitit the nodes that the processes run on as those of the job, which may have spare ones too."""
    for name in ("NODELIST", "NUM_NODES"):
        os.environ[f"SLURM_JOB_{name}"] = os.environ[f"SLURM_STEP_{name}"]


def export_job() -> None:
    """Tells training which hosts it has, and that it asked for GPUs unless the profile's environment says "0"."""
    os.environ["MVD_HOSTS"] = ",".join(JobEnvironment().hostnames)
    os.environ.setdefault("MVD_EXPECT_GPU", "1")


def run(stage: Stage, note: "ErrorNote") -> None:
    """Imports torch, and trains or tests; exits with code 2 if another attempt would be no better."""
    from mvd.distributed.faults import HostFault, PeerLost, RunFailed
    from mvd.distributed.signals import Interrupted
    from mvd.run import DISK_FAULTS, run_stage

    try:
        run_stage(stage)
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


@dataclass(frozen=True)
class ErrorNote:
    """error.json, for launch.job.attempts; only the first process to fail writes it, since it makes the others fail."""

    files: RunDirectory
    rank: int

    def write(self, lines: str, final: bool = False, signal_name: str | None = None) -> None:
        """Records an error's last lines. final: another attempt would meet it too. signal_name: its cause, if any."""
        entry = {"rank": self.rank, "host": hostname(), "lines": lines, "final": final, "signal": signal_name}
        try:
            if (lost := lost_to(self.files)) is not None:
                say(lost)
                return
            with open(self.files.error, "x") as handle:
                json.dump(entry, handle)
        except FileExistsError:
            say("another process has failed before this one")
        except (ConfigError, OSError) as error:
            say(f"{self.files.error} cannot be written: {error}")

    def leave(self, number: int, _: object) -> None:
        """Handles a signal in the seconds before training, when nothing is lost by leaving at once."""
        name = signal.Signals(number).name
        self.write(f"told to stop by {name} while starting", signal_name=name)
        os._exit(STOPPED)
