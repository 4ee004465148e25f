"""A loader's micro-batches on the device that trains."""

import time
from collections.abc import Iterator
from typing import Any

import torch

ON_DEVICE = {"images", "video", "image_video", "mask", "labels"}  # the rest is read on the host


class DeviceBatches:
    """An iterator over a loader's micro-batches; on a GPU, the next one can be copied there while another trains.

    On a CPU nothing is read ahead and nothing copied: the batches are the loader's own, when they are asked for. A
    batch that was copied has the loader's own as "host".

    source: the loader's iterator. waited: seconds for which it was waited for.
    """

    def __init__(self, source: Iterator[dict[str, Any]], device: torch.device) -> None:
        self.source, self.device = source, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: dict[str, Any] | None = None
        self.waited = 0.0

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self._read() if self.ahead is None else self.ahead
        self.ahead = None
        if self.stream is None:
            return batch
        queue = torch.cuda.current_stream(self.device)
        queue.wait_stream(self.stream)
        for name in ON_DEVICE & batch.keys():
            batch[name].record_stream(queue)  # its memory is of the other stream
        return batch

    def read_ahead(self) -> None:
        """On a GPU, starts to copy the next micro-batch there, if there is one; call it when the GPU has work."""
        if self.stream is not None and self.ahead is None:
            try:
                self.ahead = self._read()
            except StopIteration:
                self.ahead = None

    def _read(self) -> dict[str, Any]:
        asked = time.monotonic()
        batch = next(self.source)
        self.waited += time.monotonic() - asked
        if self.stream is None:
            return batch
        with torch.cuda.stream(self.stream):
            copied = {name: batch[name].to(self.device, non_blocking=True) for name in ON_DEVICE & batch.keys()}
            return batch | copied | {"host": batch}
