"""Loading a checkpoint: all ranks verify the newest, and use an older one together if any finds damage."""

import copy
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from mvd.config import ConfigError
from mvd.distributed.faults import HostFault
from mvd.distributed.process import Process, gather
from mvd.files import sha256
from mvd.host import hostname
from mvd.run_directory import MANIFEST, RunDirectory
from mvd.train.engine import Engine
from mvd.train.manifest import STATE, read_manifest
from mvd.train.random_state import restore_random_state
from mvd.train.reshard import load_resharded
from mvd.train.safe_pickle import is_safe, load_pickle, refusal

logger = logging.getLogger(__name__)

DAMAGED = "manifest.damaged.json"  # what the manifest of a damaged checkpoint is renamed to


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The update of the checkpoint that was loaded, 0 if there was none, and the states saved with it."""

    update: int
    state: Mapping[str, Any]


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
                with suppress(OSError):  # a disk that is read-only: it is found damaged again at the next start
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
    engine.checkpoint_engine = MappedFiles()
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise ConfigError(f"DeepSpeed could not read {folder}; remove that folder to resume from the one before")
    restore_random_state(load_pickle(folder / f"rng-{process.rank}.pt"))


class MappedFiles(TorchCheckpointEngine):  # type: ignore[misc]  # untyped
    """Maps the files that DeepSpeed asks for into memory, so that a host's ranks share one copy of the weights."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Called by DeepSpeed; its own would run any code that the file holds.

        On a CPU an optimizer uses the tensors of its state as they are, which must not be those of a file: they are
        copied. DeepSpeed copies the weights itself.
        """
        content = load_pickle(Path(path), map_location, mmap=True)
        for name in ("optimizer", "optimizer_state_dict"):  # of ZeRO stage 0, and of the others
            if name in content:
                content[name] = copy.deepcopy(content[name])
        return content


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
        manifest = read_manifest(folder)
        if manifest is not None:
            damaged = _damaged(folder, manifest, process)
    except OSError as error:
        failure = f"{hostname()}: {error.strerror}"
    found = gather((manifest, damaged, failure))
    failures = sorted({failure for *_, failure in found if failure is not None})
    if failures:
        raise HostFault(f"{folder} cannot be read ({'; '.join(failures)}); start the stage again once the disk works")
    return found[0][0], sorted({name for _, names, _ in found for name in names})


def _share(paths: list[Path], process: Process) -> list[Path]:
    """This rank's part of the files, since one process alone would take long to hash those of a large model."""
    return paths[process.rank :: process.world_size]


def _damaged(folder: Path, manifest: dict[str, Any], process: Process) -> list[str]:
    """Names among this rank's share that are missing or differ from the manifest."""
    expected = manifest["files"]
    damaged = []
    for path in _share([folder / name for name in sorted(expected)], process):
        try:
            intact = {"bytes": path.stat().st_size, "sha256": sha256(path)} == expected[path.name]
        except FileNotFoundError:
            intact = False
        if not intact:
            damaged.append(path.name)
    return damaged
