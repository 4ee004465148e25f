"""Copies the code at submission, so that jobs that start days later run what was submitted."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from launch.cluster import CODE
from mvd.version import SNAPSHOT, code_version

PACKAGES = ("mvd", "launch", "experiments", "ds_configs")


def take_snapshot(runs: Path) -> Path:
    """Copies the code as it is now to `<runs>/code/<commit>-<digest>` and returns that folder; an equal copy is reused.

    The copy includes uncommitted changes and new files; its snapshot.json records the commit and the diff.
    """
    files = sorted(path for name in PACKAGES for path in (CODE / name).rglob("*") if path.suffix in (".py", ".json"))
    version = code_version()
    digest = hashlib.sha256(json.dumps(version).encode())
    for path in files:
        digest.update(f"{path.relative_to(CODE)}\0".encode() + path.read_bytes())
    target = runs / "code" / f"{(version['commit'] or 'no-commit')[:9]}-{digest.hexdigest()[:8]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        for path in files:
            destination = copy / path.relative_to(CODE)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination)
        (copy / SNAPSHOT).write_text(json.dumps(version))
        copy.chmod(0o755)  # readable by others who share the runs folder
        copy.rename(target)
    return target
