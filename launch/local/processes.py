"""Runs one command as several processes of one training job on this machine, without importing torch.

torchrun does the same, but takes seconds to start and adds its own output.
"""

import os
import socket
import subprocess
import time

SECONDS_TO_EXIT = 15


def run_processes(command: list[str], count: int, environment: dict[str, str]) -> int:
    """Runs `count` processes of `command` with torchrun's variables set; returns 0, or the first failing exit code.

    If one process fails, the others are terminated, since they would wait for it forever. Each has its own process
    group, so Ctrl-C reaches only this process: it asks them to stop, waits until they have saved and raises
    KeyboardInterrupt. A second Ctrl-C kills them.
    """
    shared = os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            processes.append(subprocess.Popen(command, env=variables, process_group=0))
        return _wait_for_all(processes)
    except KeyboardInterrupt:
        _request_stop(processes)
        raise
    finally:
        _terminate(processes)


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _request_stop(processes: list[subprocess.Popen[bytes]]) -> None:
    print("\nstopping after the current update; press Ctrl-C again to stop immediately", flush=True)
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
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
