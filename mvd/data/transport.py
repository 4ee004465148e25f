"""Hands batches from a loader's processes to the training process without copying their pixels.

Pixels are written into anonymous shared memory (memfd_create), of which only the file descriptor is sent. It has no
name, so nothing can be left over whoever is killed, and it is not part of /dev/shm, which containers limit to 64 MB.
Small tensors are sent as they are: for each tensor PyTorch would open a file in /dev/shm and a connection. None of this
depends on how the processes were started.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch


class SharedPixels:
    """A new uint8 array of this shape in shared memory; sent to another process, it arrives as a tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._descriptor = os.memfd_create("pixels", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, math.prod(shape))
        self.array = np.frombuffer(_map(self._descriptor, math.prod(shape)), np.uint8).reshape(shape)

    @classmethod
    def copy_of(cls, pixels: torch.Tensor) -> "SharedPixels":
        made = cls(tuple(pixels.shape))
        np.copyto(made.array, pixels.numpy())
        return made

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        try:
            return _receive, (DupFd(self._descriptor), self.array.shape)
        except OSError as error:  # in a thread that would only print it, while the training waits for the batch
            return _not_sent, (f"{error.strerror or error} (temporary files are in {tempfile.gettempdir()})",)


def _not_sent(reason: str) -> torch.Tensor:
    raise RuntimeError(f"DataLoader worker could not send its batch: {reason}; set TMPDIR to another, short path")


def _receive(sent: Any, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        descriptor = sent.detach()
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # before PyTorch can see that the process is dead
        raise RuntimeError(f"DataLoader worker ended before its batch was received ({error!r})") from error
    try:
        memory = _map(descriptor, math.prod(shape))
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def _map(descriptor: int, size: int) -> mmap.mmap:
    """All pages at once, which is faster than a page fault for each."""
    return mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)


class Inline:
    """A small tensor that is sent with the message itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[np.ndarray]]:
        return torch.from_numpy, (self._tensor.numpy(),)
