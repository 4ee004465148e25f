"""Runs one command as several processes of one training job on this machine, without importing torch.

torchrun does the same, but takes seconds to start and adds its own output.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS_TO_EXIT = 15


def run_processes(
    command: list[str], count: int, environment: dict[str, str], log: Callable[[int], Path] | None = None
) -> int:
    """Runs `count` processes of `command` with torchrun's variables set; returns 0, or the first failing exit code.

    If one process fails, the others are terminated, since they would wait for it forever. Each has its own process
    group, so Ctrl-C reaches only this process: it asks them to stop, waits until they have saved and raises
    KeyboardInterrupt. A second Ctrl-C kills them.

    log: the existing file that a rank's output is appended to; its new lines are shown here too. Without it, the
    processes write to this process's stdout and stderr.
    """
    shared = os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    shown = [_Follower(log(rank)) for rank in range(count)] if log else []
    try:
        for rank in range(count):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            # A file, not a pipe: the processes could not write to a pipe after the end of this one.
            with open(log(rank), "ab") if log else contextlib.nullcontext() as output:
                processes.append(
                    subprocess.Popen(command, env=variables, process_group=0, stdout=output, stderr=output)
                )
        return _wait_for_all(processes, shown)
    except KeyboardInterrupt:
        _request_stop(processes, shown)
        raise
    finally:
        _terminate(processes)
        _show(shown)


class _Follower:
    """Copies the complete lines that are appended to a file to stdout."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, path.stat().st_size

    def show(self) -> None:
        with open(self.path, "rb") as handle:
            handle.seek(self.position)
            lines = handle.read().rpartition(b"\n")
        text = b"".join(lines[:2])
        self.position += len(text)
        with contextlib.suppress(OSError):  # the terminal may be closed; the processes and their logs go on
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()


def _show(followers: Sequence[_Follower]) -> None:
    for follower in followers:
        follower.show()


def _wait_for_all(processes: list[subprocess.Popen[bytes]], shown: Sequence[_Follower]) -> int:
    while True:
        _show(shown)
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _request_stop(processes: list[subprocess.Popen[bytes]], shown: Sequence[_Follower]) -> None:
    print("\nstopping after the current update; press Ctrl-C again to stop immediately", flush=True)
    try:
        for process in processes:
            process.terminate()
        while any(process.poll() is None for process in processes):
            _show(shown)
            time.sleep(0.1)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def _terminate(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()  # no effect on a process that has exited
    deadline = time.monotonic() + SECONDS_TO_EXIT
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
