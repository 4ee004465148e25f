"""Reading and writing files; writes are atomic."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a disk may do at any time, to a file that is not at fault; another attempt may succeed.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary file in the same folder, syncs it to disk and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, [] if it does not exist; damaged lines, as of a full disk, are ignored."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def append_text(path: Path, text: str) -> None:
    """Appends the whole text, or nothing if that fails."""
    with open(path, "ab", buffering=0) as handle:  # a buffer would write the rest again when it is closed
        size, left = handle.tell(), text.encode()
        try:
            while left:
                left = left[handle.write(left) :]
        except OSError:
            os.ftruncate(handle.fileno(), size)
            raise
