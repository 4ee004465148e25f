"""One call of sbatch: its folder, with the script, submitit's pickles and the logs."""

import os
import re
import secrets
import shlex
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.job.record import now
from launch.slurm.client import SubmissionError, slurm
from launch.slurm.script import explain
from mvd.config import ConfigError
from mvd.files import write_text


def new_folder(parent: Path, what: str) -> Path:
    """Makes the folder of one call of sbatch.

    Nobody but its owner may write to it: jobs unpickle what submitit puts there, and so run its code.

    Raises:
        ConfigError: SLURM would replace a part of the path.
    """
    if "%" in str(parent) or "\\" in str(parent):
        raise ConfigError(f"{parent}: SLURM replaces % and \\ in the paths of logs; choose a path without them")
    parent.mkdir(parents=True, exist_ok=True)
    mode = parent.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX and parent.stat().st_uid == os.getuid():
        parent.chmod(stat.S_IMODE(mode) | stat.S_ISVTX)  # as in /tmp: nobody can replace somebody else's folder
    stamp = re.sub(r"\D", "", now())[:14]
    folder = parent / f"{stamp}-{what}-{secrets.token_hex(2)}"
    folder.mkdir()
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~0o022)
    return folder


def script_text(folder: Path, how: Mapping[str, Any], size: int) -> str:
    """The batch script of one job, or of an array of `size`. how: submitit's parameters.

    The folder is the job's working directory, by which the launcher tells its jobs from others (see launch.job.record).
    """
    from submitit.slurm.slurm import _make_sbatch_string

    options = {**how["additional_parameters"], "chdir": str(folder)}
    parameters: dict[str, Any] = {**how, "additional_parameters": options, "map_count": size if size > 1 else None}
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command, folder, **parameters)


def write_script(folder: Path, how: Mapping[str, Any], size: int) -> Path:
    """Writes `script_text` into the folder; returns its path."""
    script = folder / "submission.sh"
    write_text(script, script_text(folder, how, size))
    return script


def call_sbatch(folder: Path, how: Mapping[str, Any], jobs: Sequence[Callable[[], None]], what: str) -> str:
    """Calls sbatch once; returns the job id, which is the whole array's if there are several jobs.

    submitit's own executor would call sbatch with whatever the shell has set for it, and reads one wording only.

    Raises:
        ConfigError: sbatch fails; its own message, and the field to change.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    script = write_script(folder, how, len(jobs))
    pickles = []
    for index, job in enumerate(jobs):
        pickles.append(folder / f"{index}.pkl")
        delayed = DelayedSubmission(job)
        delayed.set_timeout(how["time"], sys.maxsize)
        delayed.dump(pickles[-1])
    try:
        job_id = slurm.submit(script, folder)
    except SubmissionError as error:
        raise ConfigError(explain(what, str(error))) from error
    for index, pickle in enumerate(pickles):
        own = job_id if len(jobs) == 1 else f"{job_id}_{index}"
        pickle.rename(JobPaths(folder, job_id=own).submitted_pickle)
    script.rename(JobPaths(folder, job_id=job_id).submission_file)
    return job_id
