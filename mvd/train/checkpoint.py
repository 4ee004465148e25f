"""Checkpoints: a folder is one only if it has a manifest, which is written last.

A checkpoint is a folder `step-<update>` with DeepSpeed's files, one `rng-<rank>.pt` per process, `state.pt` if a part
of the run has tensors of its own (mvd.train.stateful), and `manifest.json` with the size and SHA-256 of each file.
DeepSpeed's `latest` file is not used: it may be written before all ranks have finished. Schedule and data order follow
from the update, so nothing else is saved of them; there is no loss scale.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping
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
from mvd.train.safe_pickle import is_safe, load_pickle, refusal
from mvd.train.stateful import States, split_tensors

logger = logging.getLogger(__name__)

DAMAGED = "manifest.damaged.json"  # what the manifest of a damaged checkpoint is renamed to
STATE = "state.pt"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The update of the checkpoint that was loaded, 0 if there was none, and the states saved with it."""

    update: int
    state: Mapping[str, Any]


class SaveError(RuntimeError):
    """A checkpoint or the weights could not be written; says on which hosts and why. Raised on every process."""


def save_checkpoint(
    engine: Engine, files: RunDirectory, update: int, process: Process, made_by: dict[str, Any], state: States
) -> None:
    """Saves weights, optimizer, each rank's random state and the parts' states; all ranks call it together.

    made_by: settings that a run must share with the checkpoint to resume from it. state: see mvd.train.stateful.

    Raises:
        SaveError: the disk is full, read-only or gone; older checkpoints are untouched.
    """
    target = files.checkpoints / checkpoint_name(update)
    writer = ErrorCollectingWriter()
    if process.is_first:
        with writer.collecting_errors():
            shutil.rmtree(target, ignore_errors=True)  # left by an interrupted save
            target.mkdir(parents=True)
    _abandon_if_any_failed(writer, target, process)
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda *_: None  # its write may fail on one rank while the others wait
    engine.save_checkpoint(str(target.parent), tag=target.name, save_latest=False)
    writer.save(_random_state(), str(target / f"rng-{process.rank}.pt"))
    values, tensors = split_tensors(state)
    if process.is_first and tensors:
        writer.save(tensors, str(target / STATE))
    _abandon_if_any_failed(writer, target, process)
    found: list[Path] = []
    entries: dict[str, dict[str, Any]] = {}
    with writer.collecting_errors():
        found = _content(target)
    content = sorted(set().union(*gather(found)))  # on a network disk other hosts' files appear late
    with writer.collecting_errors():
        entries = _describe(target, _share(content, process))
    described = {name: entry for part in gather(entries) for name, entry in part.items()}
    if process.is_first and len(described) == len(content):
        manifest = {
            "update": update,
            "world_size": process.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "made_by": made_by,
            "state": values,
            "files": described,
        }
        with writer.collecting_errors():
            write_json(target / MANIFEST, {**manifest, "sha256": _own_digest(manifest)})
    _abandon_if_any_failed(writer, target, process)


def save_weights(engine: Engine, path: Path, process: Process, metadata: dict[str, str]) -> None:
    """Writes all weights in fp32 and the official layout as one .safetensors file; all ranks call it together.

    Raises:
        SaveError: the disk is full, read-only or gone.
    """
    state = full_state_dict(engine)
    writer = ErrorCollectingWriter()
    if process.is_first:
        with writer.collecting_errors():
            write_atomically(path, lambda temporary: save_file(state, temporary, metadata))
    _abandon_if_any_failed(writer, path, process)


class ErrorCollectingWriter(TorchCheckpointEngine):  # type: ignore[misc]  # untyped
    """Writes DeepSpeed's files and keeps an error instead of raising it: the other ranks would wait for this one."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        with self.collecting_errors():
            write_atomically(Path(path), lambda temporary: torch.save(state_dict, temporary))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Called by DeepSpeed; its own would run any code that the file holds."""
        return load_pickle(Path(path), map_location)

    @contextmanager
    def collecting_errors(self) -> Iterator[None]:
        heartbeat("writing a checkpoint")
        try:
            yield
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # the last two: a full disk in torch or safetensors
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
    """Restores the newest good checkpoint on all ranks; update 0 if there is none.

    Every rank verifies its share of the files. If any rank finds damage, the checkpoint is reported and disabled on
    all, and the one before is tried. A checkpoint of another number of processes or another ZeRO stage is converted.

    Raises:
        ConfigError: the newest good checkpoint was made with other settings than `made_by`, or a file of it
            would run code when it is loaded.
        HostFault: reading failed with an I/O error, which is no evidence of a corrupt checkpoint.
    """
    candidates = gather(files.complete_checkpoints())[0]
    for candidate in reversed(candidates):
        manifest, damaged = verify(candidate, process)
        if manifest is None or damaged:
            if process.is_first:
                (candidate / MANIFEST).rename(candidate / DAMAGED)
                logger.warning("checkpoint %s is damaged (%s); trying the one before", candidate, ", ".join(damaged))
            continue
        _check_made_by(candidate, manifest["made_by"], made_by)
        _check_safe(candidate, manifest, process)
        logger.info("resuming after update %d from %s", manifest["update"], candidate)
        _load(engine, candidate, manifest, process)
        return LoadedCheckpoint(manifest["update"], _load_state(candidate, manifest))
    if candidates and process.is_first:
        logger.warning("no good checkpoint is left in %s; starting from update 0", files.checkpoints)
    return LoadedCheckpoint(0, {})


def _load(engine: Engine, folder: Path, manifest: dict[str, Any], process: Process) -> None:
    saved = (manifest["world_size"], manifest["zero_stage"])
    if saved != (process.world_size, engine.zero_optimization_stage()):
        running = (process.world_size, engine.zero_optimization_stage())
        logger.info(
            "resharding: saved by %d processes with ZeRO stage %d, loaded by %d with stage %d", *saved, *running
        )
        load_resharded(engine, folder, *saved)
        return
    engine.checkpoint_engine = ErrorCollectingWriter()
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise ConfigError(f"DeepSpeed could not read {folder}; remove that folder to resume from the one before")
    _restore_random_state(load_pickle(folder / f"rng-{process.rank}.pt"))


def _load_state(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The states of the run's parts, values and tensors together."""
    states: dict[str, Any] = dict(manifest["state"])
    if STATE in manifest["files"]:
        for part, tensors in torch.load(folder / STATE, map_location="cpu", weights_only=True).items():
            states[part] = states[part] | tensors
    return states


def _check_made_by(folder: Path, saved: dict[str, Any], running: dict[str, Any]) -> None:
    for name, value in running.items():
        if saved.get(name, value) != value:
            raise ConfigError(
                f"{folder} was made with {name} {saved[name]} and this run has {name} {value}, which would change the "
                f"result; continue with {saved[name]}, or remove {folder.parent} to start from scratch"
            )


def _check_safe(folder: Path, manifest: dict[str, Any], process: Process) -> None:
    """Raises ConfigError on all ranks if a file would run code when it is loaded."""
    pickles = [folder / name for name in sorted(manifest["files"]) if name.endswith(".pt")]
    unsafe = sorted(set().union(*gather([path for path in _share(pickles, process) if not is_safe(path)])))
    if unsafe:
        raise ConfigError(refusal(unsafe[0]))


def verify(folder: Path, process: Process) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest of a checkpoint, None if it is damaged, and the names of damaged files; the same on all ranks."""
    manifest: dict[str, Any] | None = None
    damaged, failure = [MANIFEST], None
    try:
        manifest = _read_manifest(folder)
        if manifest is not None:
            damaged = _damaged(folder, manifest, process)
    except OSError as error:
        failure = f"{hostname()}: {error.strerror}"
    found = gather((manifest, damaged, failure))
    failures = sorted({failure for *_, failure in found if failure is not None})
    if failures:
        raise HostFault(f"{folder} cannot be read ({'; '.join(failures)}); start the stage again once the disk works")
    return found[0][0], sorted({name for _, names, _ in found for name in names})


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if it is damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        intact = manifest.pop("sha256") == _own_digest(manifest) and checkpoint_name(manifest["update"]) == folder.name
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if intact else None


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _content(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != MANIFEST]


def _share(paths: list[Path], process: Process) -> list[Path]:
    """This rank's part of the files, since one process alone would take long to hash those of a large model."""
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
