"""What the virtual cluster needs of the machine: packages, host names, free ports."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmdbd", "mariadb-server", "munge")
HOSTS = Path("/etc/hosts")
POLICY = Path("/usr/sbin/policy-rc.d")


def can_run() -> bool:
    """True if the virtual cluster can run here: as root on Debian or Ubuntu."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install_packages() -> None:
    """Install the missing packages without starting the services they bring."""
    query = ["dpkg-query", "-W", "-f=${Package} ${Status}\n", *PACKAGES]
    present = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    missing = [name for name in PACKAGES if f"{name} install ok installed" not in present]
    if not missing:
        return
    add_policy = not POLICY.exists()
    if add_policy:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        _apt_get("update", "-qq")
        _apt_get("install", "-y", "-qq", "--no-install-recommends", *missing)
    finally:
        if add_policy:
            POLICY.unlink()


def _apt_get(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)


def add_host_names(nodes: Sequence[str]) -> None:
    """Add the nodes to /etc/hosts, since ranks find each other by node name. The lines stay; they do no harm."""
    known = HOSTS.read_text()
    lines = [f"127.0.0.1 {node}  # mvd tests\n" for node in nodes if f" {node}  # mvd tests\n" not in known]
    if lines:
        with open(HOSTS, "a") as handle:
            handle.writelines(lines)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll until the condition holds; raises TimeoutError if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {seconds:.0f} s waiting for {what}")
        time.sleep(0.1)
