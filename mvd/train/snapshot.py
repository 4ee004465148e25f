"""A copy of the training state in host memory, so that it can be written while the training changes the original."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """The memory that snapshots are copied to, used again for each: new pages, above all pinned ones, take long to get.

    At each save the same tensors come in the same order. A snapshot is valid until the next one begins.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.used = 0

    def begin(self) -> None:
        """Begins a snapshot; the one before is overwritten."""
        self.used = 0

    def copy(self, state: Any) -> Any:
        """A copy of nested containers whose tensors are on the CPU; those of a GPU go to pinned memory.

        Raises:
            RuntimeError: there is not enough memory, or the GPU fails.
        """
        copies: dict[int, Any] = {}
        for tensor in _tensors(state):
            if id(tensor) not in copies:
                copies[id(tensor)] = self._next(tensor).copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copy.deepcopy(state, copies)  # it takes what it finds there and copies the rest, which is small

    def _next(self, tensor: Tensor) -> Tensor:
        """The next buffer; shape, type and device rarely change between two saves."""
        place, self.used = self.used, self.used + 1
        known = self.buffers[place] if place < len(self.buffers) else None
        if known is not None and (known.shape, known.dtype) == (tensor.shape, tensor.dtype):
            return known
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.buffers[place:] = [buffer]  # those after it are of another order
        return buffer


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
