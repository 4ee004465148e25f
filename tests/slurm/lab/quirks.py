"""What real sites do to jobs: an unreachable controller, failing commands, a full disk, an occupied port."""

import contextlib
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.slurm.lab.cluster import Lab

CLIENTS = ("sbatch", "scancel", "scontrol", "squeue", "sacct")
ERROR = "error: Socket timed out on send/recv operation"  # what an overloaded controller's clients print
FILLER = "filler"


@contextlib.contextmanager
def controller_down(lab: Lab) -> Iterator[None]:
    """No slurmctld during the block, as while a site updates it. Jobs run on, clients wait or fail."""
    lab.stop_controller()
    try:
        yield
    finally:
        lab.start_controller()


def wrap_clients(folder: Path, lab: Lab) -> None:
    """Fill a folder with wrappers of SLURM's commands, to be first in the PATH of a user and so of the user's jobs.

    They do nothing but start the real command, until `clients_failing` says otherwise.
    """
    folder.mkdir(parents=True)
    for name in CLIENTS:
        real = shutil.which(name, path=lab.environment["PATH"])
        if real is None:
            raise FileNotFoundError(f"{name} is not installed; run `make slurm-up`")
        wrapper = folder / name
        switch = shlex.quote(str(_switch(folder, name)))
        failure = f"[ -e {switch} ] && {{ echo '{name}: {ERROR}' >&2; exit 1; }}"
        wrapper.write_text(f'#!/bin/sh\n{failure}\nexec {shlex.quote(real)} "$@"\n')
        wrapper.chmod(0o755)


@contextlib.contextmanager
def clients_failing(folder: Path, *names: str) -> Iterator[None]:
    """During the block the named commands of a folder of `wrap_clients` fail at once, with exit code 1."""
    switches = [_switch(folder, name) for name in names]
    for switch in switches:
        switch.touch()
    try:
        yield
    finally:
        for switch in switches:
            switch.unlink()


def _switch(folder: Path, name: str) -> Path:
    """The file whose existence makes the command fail."""
    return folder / f"{name}.fails"


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of this size in an empty folder, whose files are gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy: processes may still have files open


@contextlib.contextmanager
def disk_full(folder: Path) -> Iterator[None]:
    """No room left on the folder's file system during the block; only for a `small_disk`."""
    if not folder.is_mount():
        raise ValueError(f"{folder} must be a small_disk, else this would fill the machine's own disk")
    filler = folder / FILLER
    try:
        with open(filler, "wb", buffering=0) as handle, contextlib.suppress(OSError):  # OSError: it is full
            while handle.write(bytes(4096)):
                pass
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def port_taken(port: int) -> Iterator[None]:
    """Another program listens on this port during the block, on all virtual nodes, since they share one machine."""
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        yield
