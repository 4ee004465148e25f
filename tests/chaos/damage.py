"""Damage to a checkpoint on disk."""

import os
import random
import shutil
from pathlib import Path

from mvd.run_directory import MANIFEST, RunDirectory

DAMAGES = ("truncated file", "flipped bit", "damaged manifest", "deleted checkpoint")


def damage(run: Path, draw: random.Random) -> str:
    """Damages the newest checkpoint of a run directory, which must have one; returns how."""
    how = draw.choice(DAMAGES)
    newest = RunDirectory(run).complete_checkpoints()[-1]
    files = sorted(path for path in newest.iterdir() if path.name != MANIFEST)
    path = newest / MANIFEST if how == "damaged manifest" else draw.choice(files)
    if how == "deleted checkpoint":
        shutil.rmtree(newest)
    elif how == "truncated file":
        os.truncate(path, draw.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return how
