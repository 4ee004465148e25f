"""Which code runs: its commit, and how the files differ from it. Must not import torch."""

import json
import logging
import os
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SNAPSHOT = "snapshot.json"  # in the copy of the code that jobs run, which has no history: the original's version

logger = logging.getLogger(__name__)


def code_version() -> dict[str, str | None]:
    """`commit` and `diff` of the code that runs; if they are unknown, both are null and `note` says why.

    A repository that merely contains the code, such as one around a virtual environment, does not count. A checkout
    that git refuses to read is logged as a warning.
    """
    snapshot = PROJECT / SNAPSHOT
    if snapshot.is_file():
        recorded: dict[str, str | None] = json.loads(snapshot.read_text())
        return recorded
    if not (PROJECT / ".git").exists():
        return _unknown(f"{PROJECT} is not a git checkout")
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != PROJECT.resolve():
            return _unknown(f"{PROJECT} is not a git checkout itself, only inside that of {top}")
        return {"commit": commit, "diff": _git("diff", "--no-ext-diff", "--no-color", "HEAD").strip()}
    except (OSError, subprocess.CalledProcessError) as error:
        unknown = _unknown(f"the commit of {PROJECT} cannot be recorded: {_explain(error)}")
        logger.warning(unknown["note"])
        return unknown


def _unknown(note: str) -> dict[str, str | None]:
    return {"commit": None, "diff": None, "note": note}


def _git(*arguments: str) -> str:
    """What git prints about the project; GIT_DIR and the like, which point it elsewhere, are not passed on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(
        command, env=environment | {"LC_ALL": "C"}, capture_output=True, text=True, errors="replace", check=True
    ).stdout


def _explain(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"git cannot be run ({error.strerror})"
    said = " ".join(error.stderr.split())
    if "dubious ownership" in said:
        return f"it belongs to another user; run `git config --global --add safe.directory {PROJECT}`"
    return f"git says: {said}"
