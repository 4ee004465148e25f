"""Saving a checkpoint: the run waits only while its state is copied; a thread of each process writes the copy.

A checkpoint is a folder `step-<update>` with DeepSpeed's files, one `rng-<rank>.pt` per process, `state.pt` if a part
of the run has tensors of its own (mvd.train.stateful), and `manifest.json`, which is written last, once all processes
have written their files: a folder without it is no checkpoint. DeepSpeed's `latest` file is not used: it may be written
before all ranks have finished. Schedule and data order follow from the update, so nothing else is saved of them; there
is no loss scale.
"""

import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import save_file

from mvd.distributed.process import Process, gather
from mvd.distributed.watchdog import background_heartbeat, heartbeat
from mvd.files import write_atomically
from mvd.host import hostname
from mvd.run_directory import RunDirectory, checkpoint_name
from mvd.train.engine import Engine, full_state_dict
from mvd.train.manifest import STATE, remove_checkpoint, write_manifest
from mvd.train.random_state import random_state
from mvd.train.snapshot import HostBuffers
from mvd.train.stateful import States, split_tensors

logger = logging.getLogger(__name__)

WRITING, WAITING = "writing a checkpoint", "waiting for the others' checkpoint files"
FAILURES = (OSError, RuntimeError, SafetensorError)  # the last two: a full disk or memory in torch or safetensors


class SaveError(RuntimeError):
    """A checkpoint or the weights could not be written; says on which hosts and why. Raised on every process."""


class Snapshot(TorchCheckpointEngine):  # type: ignore[misc]  # untyped
    """Takes what DeepSpeed saves, copies it to the host's memory, and leaves the writing to others.

    An error is kept instead of raised: the other ranks would wait for this one.
    """

    def __init__(self, buffers: HostBuffers) -> None:
        super().__init__()
        self.buffers = buffers
        self.files: dict[Path, Any] = {}
        self.failure: str | None = None
        buffers.begin()

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.files[Path(path)] = self.buffers.copy(state_dict)
        except FAILURES as error:
            self.failure = _described(error)


class CheckpointWrite:
    """A checkpoint whose files are being written; it exists once `finish` has returned.

    manifest: what the manifest has besides the list of files.
    """

    def __init__(self, target: Path, snapshot: Snapshot, manifest: dict[str, Any], process: Process) -> None:
        self.target, self.manifest, self.process = target, manifest, process
        self.update: int = manifest["update"]
        self.files, self.failure = snapshot.files, snapshot.failure
        self.entries: dict[str, dict[str, Any]] = {}
        self.error: BaseException | None = None
        self.cancelled = threading.Event()
        # The ZIP format's CRC32 is computed with the interpreter locked, while the training waits; the manifest's
        # SHA-256 covers every byte. Nothing else that a run writes is in this format.
        torch.serialization.set_crc32_options(False)
        self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self.thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this process has written its files, or failed to."""
        return not self.thread.is_alive()

    def _write(self) -> None:
        started = time.monotonic()
        try:
            for path, content in ({} if self.failure else self.files).items():
                self._note_progress()
                self.entries[path.name] = write_hashed(path, content, self._note_progress)
        except FAILURES as error:
            self.failure = _described(error)
        except BaseException as error:  # raised again where the run waits for the files
            self.error = error
        finally:
            background_heartbeat(None)
        size = sum(entry["bytes"] for entry in self.entries.values())
        logger.debug("%s: %.2f GB in %.1f s", self.target, size / 1e9, time.monotonic() - started)

    def _note_progress(self) -> None:
        background_heartbeat(WRITING, self.update)
        if self.cancelled.is_set():
            raise OSError("abandoned")

    def finish(self) -> None:
        """Waits until all ranks have written their files, and writes the manifest; all ranks call it together.

        Raises:
            SaveError: the disk is full, read-only or gone, on any rank; what was written is removed.
        """
        self._wait()
        if self.error is not None:
            raise self.error
        heartbeat(WAITING)
        everyone = gather((self.entries, self.failure))
        _give_up_if_any_failed([failure for _, failure in everyone], self.target, self.process)
        files = {name: entry for entries, _ in everyone for name, entry in entries.items()}
        failure = None
        if self.process.is_first:
            failure = _attempt(lambda: write_manifest(self.target, {**self.manifest, "files": files}))
        _give_up_if_any_failed(gather(failure), self.target, self.process)

    def abandon(self) -> None:
        """Ends the thread; what it has written has no manifest. For one process alone, as after an error."""
        self.cancelled.set()
        self._wait()

    def _wait(self) -> None:
        while self.thread.is_alive():
            heartbeat(WRITING)  # if the thread hangs, its own heartbeat shows it
            self.thread.join(0.1)


def start_checkpoint(
    engine: Engine,
    files: RunDirectory,
    update: int,
    process: Process,
    made_by: dict[str, Any],
    state: States,
    buffers: HostBuffers,
) -> CheckpointWrite:
    """Copies weights, optimizer, each rank's random state and the parts' states, and starts to write the copies.

    All ranks call it together, and no other write may be in progress. made_by: settings that a run must share with the
    checkpoint to resume from it. state: see mvd.train.stateful. buffers: the same at every save.

    Raises:
        SaveError: the folder cannot be made; older checkpoints are untouched.
    """
    target = files.checkpoints / checkpoint_name(update)
    failure = _attempt(lambda: _make_empty(target)) if process.is_first else None
    _give_up_if_any_failed(gather(failure), target, process)
    snapshot = Snapshot(buffers)
    engine.checkpoint_engine = snapshot
    engine._copy_recovery_script = lambda *_: None  # its write may fail on one rank while the others wait
    engine.save_checkpoint(str(target.parent), tag=target.name, save_latest=False)
    snapshot.save(random_state(), str(target / f"rng-{process.rank}.pt"))
    values, tensors = split_tensors(state)
    if process.is_first and tensors:
        snapshot.save(tensors, str(target / STATE))
    manifest = {
        "update": update,
        "world_size": process.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "made_by": made_by,
        "state": copy.deepcopy(values),
    }
    return CheckpointWrite(target, snapshot, manifest, process)


def save_weights(engine: Engine, path: Path, process: Process, metadata: dict[str, str]) -> None:
    """Writes all weights in fp32 and the official layout as one .safetensors file; all ranks call it together.

    Raises:
        SaveError: the disk is full, read-only or gone.
    """
    state = full_state_dict(engine)
    failure = None
    if process.is_first:
        heartbeat(WRITING)
        failure = _attempt(lambda: write_atomically(path, lambda temporary: save_file(state, temporary, metadata)))
    heartbeat(WAITING)
    _give_up_if_any_failed(gather(failure), path, process)


def write_hashed(path: Path, content: Any, note_progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """torch.save, atomically; returns the size and the SHA-256 of the file without reading it again.

    note_progress: called before each part that is written.
    """
    entry: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            hashed = _HashedFile(file, note_progress)
            try:
                torch.save(content, cast(IO[bytes], hashed))
            except RuntimeError as error:  # torch hides why the file could not be written
                raise hashed.error or error from None
        entry.update(bytes=hashed.bytes, sha256=hashed.digest.hexdigest())

    write_atomically(path, write)
    return entry


class _HashedFile:
    """The part of a file's interface that torch.save needs."""

    def __init__(self, file: IO[bytes], note_progress: Callable[[], None]) -> None:
        self.file, self.note_progress = file, note_progress
        self.digest, self.bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.note_progress()
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _make_empty(folder: Path) -> None:
    remove_checkpoint(folder)  # left by an interrupted save
    folder.mkdir(parents=True)


def _attempt(write: Callable[[], None]) -> str | None:
    """Why writing failed, None if it did not; raised on one rank it would leave the others waiting."""
    try:
        write()
    except FAILURES as error:
        return _described(error)
    return None


def _described(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{hostname()}: {lines[0]}"


def _give_up_if_any_failed(failures: list[str | None], target: Path, process: Process) -> None:
    """If any rank failed to write, abandon the checkpoint on all ranks and delete it.

    Raises:
        SaveError: a rank failed.
    """
    reasons = sorted({failure for failure in failures if failure is not None})
    if reasons:
        if process.is_first:
            remove_checkpoint(target)
        raise SaveError(f"{target} cannot be written ({'; '.join(reasons)})")
