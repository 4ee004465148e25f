"""Processes of this machine, from /proc. A process that ends while it is read looks empty, not like an error."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def name_of(pid: int) -> str:
    return _read(pid, "comm").strip()


def command_of(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ").strip()


def environment_of(pid: int) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in _read(pid, "environ").split("\0") if "=" in pair)


def is_zombie(pid: int) -> bool:
    return _status_fields(pid)[:1] == ["Z"]


def parent_of(pid: int) -> int:
    """0 if the process has ended."""
    fields = _status_fields(pid)
    return int(fields[1]) if fields else 0


def open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(link))
    return found


def descendants(roots: Iterable[int]) -> set[int]:
    """Children of these processes, and their children, without the processes themselves."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        children.setdefault(parent_of(pid), []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        born = set(children.get(waiting.pop(), [])) - found
        found |= born
        waiting += born
    return found


def kill(doomed: Iterable[int]) -> None:
    """SIGKILL to each, in this order."""
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _status_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: state, parent, ..."""
    return _read(pid, "stat").rpartition(")")[2].split()
