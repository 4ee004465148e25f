"""What every process of a SLURM job runs: one stage, from whatever its run directory holds, or a share of preparing."""

import argparse
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from launch.job.attempts import LINES, job_id
from launch.job.record import now
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.run_directory import RunDirectory
from mvd.stage import Stage


@dataclass(frozen=True)
class StageJob:
    """A stage, or a shard of one, for submitit to pickle; its state is all in the run directory."""

    directory: str
    shard: int

    def __call__(self) -> None:
        """Runs the stage in this process. Told to stop, it returns early: no result then means to go on later."""
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        rank = int(os.environ["RANK"])
        print(f"=== job {job_id()}, rank {rank} on {hostname()}, {now()}", flush=True)
        stage = Stage.from_yaml(RunDirectory(Path(self.directory)).stage).in_shards()[self.shard]
        note = ErrorNote(stage.job_files.error, rank)
        for number in (signal.SIGUSR2, signal.SIGTERM):  # submitit's own would requeue in the middle of a step
            signal.signal(number, note.leave)
        try:
            export_job()
            run(stage, note)
        except Exception:
            note.write("\n".join(traceback.format_exc().strip().splitlines()[-LINES:]))
            raise


@dataclass(frozen=True)
class PrepareJob:
    """A share of preparing a data set, number and count; its state is all in the data set's folder."""

    arguments: argparse.Namespace
    share: tuple[int, int]

    def __call__(self) -> None:
        """Does what is left of the share; where it fails, its exit code keeps the last job from starting."""
        from mvd.data.prepare.prepare import run as prepare

        print(f"=== job {job_id()} on {hostname()}, {now()}", flush=True)
        code = prepare(argparse.Namespace(**vars(self.arguments) | {"shard": self.share}))
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit shortly before a time limit or a preemption, which then requeues the job."""
        return DelayedSubmission(self)


def export_job() -> None:
    """Tells training which hosts the job has, and that it asked for GPUs unless the profile's environment says "0"."""
    os.environ["MVD_HOSTS"] = ",".join(JobEnvironment().hostnames)
    os.environ.setdefault("MVD_EXPECT_GPU", "1")


def run(stage: Stage, note: "ErrorNote") -> None:
    """Imports torch, and trains or tests; leaves with exit code 2 where another attempt would be no better."""
    from mvd.distributed.exit_codes import RETRYABLE
    from mvd.distributed.faults import HostFault, PeerLost, RunFailed
    from mvd.distributed.signals import Interrupted
    from mvd.run import DISK_FAULTS, run_stage

    try:
        run_stage(stage)
    except Interrupted as stop:
        print(stop, flush=True)
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", flush=True)
        note.write(f"error: {error}", final=True)
        sys.exit(2)
    except (HostFault, PeerLost) as error:
        print(f"error: {error}", flush=True)
        note.write(f"error: {error}")
        sys.exit(RETRYABLE)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        said = f"error: {error.filename or 'a file'}: {error.strerror}; mend that, then submit the row again"
        print(said, flush=True)
        note.write(said)  # another attempt may meet a disk that has room again, or another machine
        sys.exit(2)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class ErrorNote:
    """What launch.job.attempts is to know of a failure; the first process to fail is the cause of the others' failing."""

    path: Path
    rank: int

    def write(self, lines: str, final: bool = False) -> None:
        """Leaves an error's last lines; `final`: another attempt would meet it too."""
        try:
            with open(self.path, "x") as handle:
                json.dump({"rank": self.rank, "host": hostname(), "lines": lines, "final": final}, handle)
        except FileExistsError:
            print("another process has failed before this one", flush=True)
        except OSError as error:
            print(f"{self.path} cannot be written: {error}", flush=True)

    def leave(self, number: int, _: object) -> None:
        """Handles a signal in the seconds before training, when nothing is lost by leaving at once."""
        self.write(f"told to stop by {signal.Signals(number).name} while starting")
        os._exit(os.EX_TEMPFAIL)
