"""The port at which the processes of an attempt find each other, chosen on the job's first node."""

import random
import socket
from pathlib import Path

LOWEST, HIGHEST = 10_000, 65_535
TRIES = 100
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the kernel gives these to outgoing connections


def free_port(ephemeral: Path = EPHEMERAL) -> int:
    """A random port that nobody listens on now, outside the ephemeral range if that leaves any."""
    try:
        low, high = map(int, ephemeral.read_text().split())
    except (OSError, ValueError):
        low, high = 32_768, 60_999  # Linux' own default
    outside = [port for port in range(LOWEST, HIGHEST + 1) if not low <= port <= high]
    candidates = random.Random().sample(outside, k=min(len(outside), TRIES))
    return next((port for port in candidates if _is_free(port)), 0) or _any_port()


def _is_free(port: int) -> bool:
    """True if a server could listen on the port on all addresses, as torch's TCPStore does."""
    both = socket.has_dualstack_ipv6()
    try:
        with socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both):
            return True
    except OSError:
        return False


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
