"""A checkpoint's manifest: what the checkpoint is of, and the size and SHA-256 of each of its files and of itself."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from mvd.files import write_json
from mvd.run_directory import MANIFEST, checkpoint_name

STATE = "state.pt"  # the tensors of the run's parts (mvd.train.stateful); in the folder only if there are any


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest, which makes the folder a checkpoint."""
    write_json(folder / MANIFEST, {**content, "sha256": _own_digest(content)})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if it is damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        intact = manifest.pop("sha256") == _own_digest(manifest) and checkpoint_name(manifest["update"]) == folder.name
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if intact else None


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first, so that a kill leaves none that is not whole; ignores errors."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
