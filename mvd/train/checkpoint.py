"""Checkpoints, which count only with their manifest, written last.

A checkpoint is a folder `step-<update>` of DeepSpeed's files, one `rng-<rank>.pt` a process, and `manifest.json`
with the size and sha256 of each. DeepSpeed's own `latest` file is not used: nothing makes it wait for all ranks.
The update says where in the schedule and in the data a run is, since both follow from it; there is no loss scale.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import save_file

from mvd.config import ConfigError
from mvd.distributed.faults import HostFault
from mvd.distributed.process import Process, gather
from mvd.distributed.watchdog import heartbeat
from mvd.files import sha256, write_atomically, write_json
from mvd.host import hostname
from mvd.run_directory import MANIFEST, RunDirectory, checkpoint_name
from mvd.train.engine import Engine, full_state_dict
from mvd.train.reshard import load_resharded

logger = logging.getLogger(__name__)

DAMAGED = "manifest.damaged.json"  # what the manifest becomes where the checkpoint is not what it says


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint said: its update (0 where there was none) and the state that was saved with it."""

    update: int
    state: dict[str, Any]


class SaveError(RuntimeError):
    """A checkpoint or the weights could not be written; says on which hosts and why. Raised on every process."""


def save_checkpoint(
    engine: Engine, files: RunDirectory, update: int, process: Process, made_by: dict[str, Any], state: dict[str, Any]
) -> None:
    """Saves weights, optimizer and every rank's random state as `step-<update>`; all ranks call it together.

    made_by: what a run must have in common with the checkpoint to go on from it. state: what else the run wants back,
    as JSON. Until the manifest is renamed into place the folder does not count.

    Raises:
        CannotSave: the disk is full, read-only or gone; the older checkpoints are as they were.
    """
    target = files.checkpoints / checkpoint_name(update)
    writer = ErrorCollectingWriter()
    if process.is_first:
        with writer.collecting_errors():
            shutil.rmtree(target, ignore_errors=True)  # a save that was cut off
            target.mkdir(parents=True)
    _abandon_if_any_failed(writer, target, process)
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda *_: None  # a write that could fail on one rank while the others wait
    engine.save_checkpoint(str(target.parent), tag=target.name, save_latest=False)
    writer.save(_random_state(), str(target / f"rng-{process.rank}.pt"))
    _abandon_if_any_failed(writer, target, process)
    found: list[Path] = []
    entries: dict[str, dict[str, Any]] = {}
    with writer.collecting_errors():
        found = _content(target)
    content = sorted(set().union(*gather(found)))  # a network disk shows others' files late
    with writer.collecting_errors():
        entries = _describe(target, _share(content, process))
    files = {name: entry for part in gather(entries) for name, entry in part.items()}
    if process.is_first and len(files) == len(content):
        manifest = {
            "update": update,
            "world_size": process.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "made_by": made_by,
            "state": state,
            "files": files,
        }
        with writer.collecting_errors():
            write_json(target / MANIFEST, {**manifest, "sha256": _own_digest(manifest)})
    _abandon_if_any_failed(writer, target, process)


def save_weights(engine: Engine, path: Path, process: Process, metadata: dict[str, str]) -> None:
    """Writes all weights in fp32 and the official layout as one .safetensors file; all ranks call it together.

    Raises:
        CannotSave: as above.
    """
    state = full_state_dict(engine)
    writer = ErrorCollectingWriter()
    if process.is_first:
        with writer.collecting_errors():
            write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
    _abandon_if_any_failed(writer, path, process)


class ErrorCollectingWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files to the disk itself, and notes a failure instead of raising it.

    A rank that raised in the middle of a save would leave the others waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        with self.collecting_errors():
            write_atomically(Path(path), lambda temporary: torch.save(state_dict, temporary))

    @contextmanager
    def collecting_errors(self) -> Iterator[None]:
        heartbeat("writing a checkpoint")
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two: how libraries say that it is full
            lines = str(error).splitlines() or [type(error).__name__]
            self.failure = f"{hostname()}: {lines[0]}"
        heartbeat("waiting for the others' checkpoint files")


def _abandon_if_any_failed(writer: ErrorCollectingWriter, target: Path, process: Process) -> None:
    """If any rank failed to write, abandon the checkpoint on all ranks and delete it."""
    heartbeat("waiting for the others' checkpoint files")
    failures = [failure for failure in gather(writer.failure) if failure is not None]
    if failures:
        if process.is_first:
            shutil.rmtree(target, ignore_errors=True)
        raise SaveError(f"{target} cannot be written ({'; '.join(sorted(set(failures)))})")


def load_newest_checkpoint(
    engine: Engine, files: RunDirectory, process: Process, made_by: dict[str, Any]
) -> LoadedCheckpoint:
    """Restores the newest good checkpoint on all ranks; update 0 where there is none.

    Every rank verifies its share of the files and all agree; a damaged checkpoint is named, no longer counts, and the
    one before it is tried. One of another number of processes or another ZeRO stage is converted on the way.

    Raises:
        ConfigError: the newest good one was made by another kind of run than `made_by` says.
        HostFault: a disk does not give a file that is there, which says nothing against the checkpoint.
    """
    candidates = gather(files.complete_checkpoints())[0]
    for candidate in reversed(candidates):
        manifest, damaged = _verify(candidate, process)
        if manifest is None or damaged:
            if process.is_first:
                (candidate / MANIFEST).rename(candidate / DAMAGED)
                logger.warning(f"checkpoint {candidate} is damaged ({', '.join(damaged)}); trying the one before")
            continue
        _check_made_by(candidate, manifest["made_by"], made_by)
        logger.info(f"resuming after update {manifest['update']} from {candidate}")
        _load(engine, candidate, manifest, process)
        return LoadedCheckpoint(manifest["update"], manifest["state"])
    if candidates and process.is_first:
        logger.warning(f"no good checkpoint is left in {files.checkpoints}; starting from update 0")
    return LoadedCheckpoint(0, {})


def _load(engine: Engine, folder: Path, manifest: dict[str, Any], process: Process) -> None:
    saved = (manifest["world_size"], manifest["zero_stage"])
    if saved != (process.world_size, engine.zero_optimization_stage()):
        logger.info(
            f"it was saved by {saved[0]} processes with ZeRO stage {saved[1]}; {process.world_size} with stage "
            f"{engine.zero_optimization_stage()} go on from it"
        )
        load_resharded(engine, folder, *saved)
        return
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise ConfigError(f"DeepSpeed could not read {folder}; remove that folder to go on from the one before")
    _restore_random_state(torch.load(folder / f"rng-{process.rank}.pt", weights_only=False))


def _check_made_by(folder: Path, saved: dict[str, Any], running: dict[str, Any]) -> None:
    for name, value in running.items():
        if saved.get(name, value) != value:
            raise ConfigError(
                f"{folder} was made with {name} {saved[name]} and this run has {name} {value}, which would change the "
                f"result; go on with {saved[name]}, or remove {folder.parent} to start again"
            )


def _verify(folder: Path, process: Process) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, None where it is damaged itself, and the names of damaged files; all ranks find the same."""
    manifest, damaged, failure = None, [MANIFEST], None
    try:
        manifest = _read_manifest(folder)
        if manifest is not None:
            damaged = _damaged(folder, manifest, process)
    except OSError as error:
        failure = f"{hostname()}: {error.strerror}"
    found = gather((manifest, damaged, failure))
    failures = sorted({failure for *_, failure in found if failure is not None})
    if failures:
        raise HostFault(f"{folder} cannot be read ({'; '.join(failures)}); start it again once the disk answers")
    return found[0][0], sorted({name for _, names, _ in found for name in names})


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where it is damaged itself."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        intact = manifest.pop("sha256") == _own_digest(manifest) and checkpoint_name(manifest["update"]) == folder.name
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if intact else None


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
    damaged = []
    for path in _share([folder / name for name in sorted(expected)], process):
        try:
            intact = _describe(folder, [path])[path.name] == expected[path.name]
        except FileNotFoundError:
            intact = False
        if not intact:
            damaged.append(path.name)
    return damaged


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
