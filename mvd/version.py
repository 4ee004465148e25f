"""Which code this is: the commit, and what differs from it. Free of torch."""

import json
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SNAPSHOT = "snapshot.json"  # in a copy made for jobs, which has no history: what the original said


def code_version() -> dict[str, str | None]:
    """`commit` and `diff` of the code that runs; nulls where it is neither in a git repository nor a job's copy."""
    note = PROJECT / SNAPSHOT
    if note.is_file():
        return json.loads(note.read_text())
    return {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history: recorded as unknown
        return None
    return done.stdout.strip()
