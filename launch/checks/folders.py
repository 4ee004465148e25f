"""Whether the runs folder is fit for jobs on several nodes."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from mvd.config import ConfigError

LITTLE_GB = 50.0  # a ViT-H checkpoint has about 9 GB, and several are kept
LOCAL = {"tmpfs", "ramfs", "overlay", "devtmpfs"}  # file systems that no other machine sees


def check_runs_folder(runs: Path, nodes: int) -> str:
    """Writes, locks and renames as a run does; returns the file system and its free space.

    Raises:
        ConfigError: one of these fails, the disk is nearly full, or several nodes cannot share the folder.
        OSError: it cannot be written.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=runs) as folder:
        _try_out(Path(folder))
    kind = file_system(runs)
    free_gb = shutil.disk_usage(runs).free / 1e9
    if kind in LOCAL and nodes > 1:
        raise ConfigError(f"{runs} is on {kind}, which other nodes do not see; set runs to a folder on a shared disk")
    if free_gb < LITTLE_GB:
        raise ConfigError(f"{runs} has {free_gb:.0f} GB free; free at least {LITTLE_GB:.0f} GB, or set another folder")
    return f"{runs} on {kind}, {free_gb:,.0f} GB free; can be written, locked and renamed in"


def file_system(path: Path) -> str:
    """The type of the file system that a path is on, as /proc/mounts calls it."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, name, *_ = line.split()
        point = point.replace("\\040", " ")
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def _try_out(folder: Path) -> None:
    """The operations that submissions, checkpoints and owner records rely on."""
    first, second = folder / "first", folder / "second"
    with open(first, "x") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder.parent} is on a disk without file locks ({error.strerror}); set another folder"
            ) from error
        handle.write("content")
        handle.flush()
        os.fsync(handle.fileno())
    first.rename(second)
    if first.exists() or second.read_text() != "content":
        raise ConfigError(f"{folder.parent}: a renamed file is not what was written; set a folder on another disk")
    os.link(second, first)
