"""Runs one command as several processes of one training job on this machine, without importing torch.

torchrun does the same; this starts seconds sooner and adds nothing to what the processes print.
"""

import os
import socket
import subprocess
import time

SECONDS_TO_LEAVE = 15
STOPPED = 75  # exit code of a stage that a signal stopped, after it has saved (EX_TEMPFAIL)


def run_processes(command: list[str], count: int, environment: dict[str, str]) -> int:
    """Runs `command` `count` times with torchrun's variables set; returns 0, or the first failing exit code.

    When one process fails the others are told to leave, since they would wait for it for ever. Each is in a process
    group of its own, so that Ctrl-C reaches only this one: it asks them to stop, waits until they have saved and
    raises KeyboardInterrupt. A second Ctrl-C kills them.
    """
    shared = os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            processes.append(subprocess.Popen(command, env=variables, process_group=0))
        return _wait_for_all(processes)
    except KeyboardInterrupt:
        _ask_to_stop(processes)
        raise
    finally:
        _end(processes)


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _ask_to_stop(processes: list[subprocess.Popen[bytes]]) -> None:
    print("\nstopping after this update; once more to stop at once", flush=True)
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()  # nothing where it has ended
    deadline = time.monotonic() + SECONDS_TO_LEAVE
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
