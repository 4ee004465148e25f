"""What went wrong in a run: one line of faults.jsonl each, and a loud line in the log."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FAULTS = "faults.jsonl"


class GivenUp(RuntimeError):
    """A run cannot go on as it is; one sentence says why. Raised on every process; starting it again is no help."""


def record_fault(
    directory: Path, kind: str, message: str, update: int | None = None, hosts: Sequence[str] = ()
) -> None:
    """Says it on stderr and appends {time, fault, update, hosts, message} to the run directory's faults.jsonl.

    hosts: the machines that are to blame, which another attempt may avoid. Never raises: the fault may be the disk.
    """
    print(f"FAULT ({kind}): {message}", file=sys.stderr, flush=True)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": time, "fault": kind, "update": update, "hosts": list(hosts), "message": message}
    try:
        with open(directory / FAULTS, "a") as handle:
            handle.write(json.dumps(entry) + "\n")
    except OSError as error:
        print(f"FAULT (log): {directory / FAULTS} cannot be written: {error}", file=sys.stderr, flush=True)


def read_faults(directory: Path) -> list[dict[str, Any]]:
    """A run directory's faults, oldest first; a line that a full disk has cut off is left out."""
    path = directory / FAULTS
    faults = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            faults.append(json.loads(line))
        except ValueError:
            continue
    return faults
