"""Checkpoints that count only with their manifest, written last (design invariant 4).

A checkpoint is a folder `step-<update>` of DeepSpeed's files, one `rng-<rank>.pt` a process, and `manifest.json`
with the size and sha256 of each. DeepSpeed's own `latest` file is not used: nothing makes it wait for all ranks.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mvd.config import ConfigError
from mvd.files import sha256, write_json
from mvd.train.engine import Engine, Process, gather

MANIFEST = "manifest.json"
DAMAGED = "manifest.damaged.json"  # what the manifest becomes where the checkpoint is not what it says


def save_checkpoint(engine: Engine, folder: Path, update: int, process: Process, keep: int) -> None:
    """Saves weights, optimizer and every rank's random state as `step-<update>`, then prunes to the newest `keep`.

    All ranks call it together. Until the manifest is renamed into place the folder does not count. Pruning removes
    the saves that were cut off, too.
    """
    tag = _tag(update)
    target = folder / tag
    if process.is_first:
        shutil.rmtree(target, ignore_errors=True)  # a save that was cut off
        target.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    torch.save(_random_state(), target / f"rng-{process.rank}.pt")
    dist.barrier()
    content = sorted(set().union(*gather(_content(target))))  # a network disk shows others' files late
    entries = gather(_describe(target, _share(content, process)))
    if process.is_first:
        manifest = {
            "update": update,
            "world_size": process.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "files": {name: entry for part in entries for name, entry in part.items()},
        }
        write_json(target / MANIFEST, manifest)
        for old in set(folder.glob("step-*")) - set(_complete(folder)[-keep:]):
            shutil.rmtree(old)
    dist.barrier()


def load_newest_checkpoint(engine: Engine, folder: Path, process: Process) -> int:
    """Restores the newest good checkpoint on all ranks; returns its update, or 0 where there is none.

    Every rank verifies its share of the files and all agree; a damaged checkpoint is named, no longer counts, and the
    one before it is tried.

    Raises:
        ConfigError: the newest good one was saved by another number of processes or another ZeRO stage.
    """
    candidates = gather(_complete(folder))[0]
    for candidate in reversed(candidates):
        manifest = gather(_read_manifest(candidate))[0]
        if manifest is None:
            damaged = [MANIFEST]
        else:
            damaged = [name for part in gather(_damaged(candidate, manifest, process)) for name in part]
        if damaged:
            if process.is_first:
                (candidate / MANIFEST).rename(candidate / DAMAGED)
                print(f"checkpoint {candidate} is damaged ({', '.join(damaged)}); trying the one before", flush=True)
            continue
        _check_same_shape(candidate, manifest, engine, process)
        loaded, _ = engine.load_checkpoint(str(folder), tag=candidate.name)
        if loaded is None:
            raise ConfigError(f"DeepSpeed could not read {candidate}; remove that folder to go on from the one before")
        _restore_random_state(torch.load(candidate / f"rng-{process.rank}.pt", weights_only=False))
        if process.is_first:
            print(f"resuming after update {manifest['update']} from {candidate}", flush=True)
        return manifest["update"]
    if candidates and process.is_first:
        print(f"no good checkpoint is left in {folder}; starting from update 0", flush=True)
    return 0


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders with a manifest, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where it is damaged itself."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        intact = _tag(manifest["update"]) == folder.name and {"world_size", "zero_stage", "files"} <= manifest.keys()
    except (ValueError, TypeError, KeyError):
        return None
    return manifest if intact else None


def _tag(update: int) -> str:
    return f"step-{update:08d}"


def _content(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != MANIFEST]


def _share(paths: list[Path], process: Process) -> list[Path]:
    """This rank's part of the files to read: checksums of large models should not wait for one process."""
    return paths[process.rank :: process.world_size]


def _describe(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}


def _damaged(folder: Path, manifest: dict[str, Any], process: Process) -> list[str]:
    """Names among this rank's share that are missing or differ from the manifest."""
    expected = manifest["files"]
    mine = _share([folder / name for name in sorted(expected)], process)
    present = _describe(folder, [path for path in mine if path.is_file()])
    return [path.name for path in mine if present.get(path.name) != expected[path.name]]


def _check_same_shape(folder: Path, manifest: dict[str, Any], engine: Engine, process: Process) -> None:
    if manifest["world_size"] != process.world_size:
        raise ConfigError(
            f"{folder} was saved by {manifest['world_size']} processes and {process.world_size} are running; "
            f"resume with {manifest['world_size']}"
        )
    if manifest["zero_stage"] != engine.zero_optimization_stage():
        raise ConfigError(
            f"{folder} was saved with ZeRO stage {manifest['zero_stage']} and this run uses stage "
            f"{engine.zero_optimization_stage()}; resume with the former"
        )


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
