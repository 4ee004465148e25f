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

    source: the loader's iterator.
    """

    def __init__(self, source: Iterator[dict[str, Any]], device: torch.device) -> None:
        self.source, self.device = source, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: dict[str, Any] | None = None
        self._waited = self._waited_ahead = 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event, bool]] = []  # not counted yet; if it read ahead

    @property
    def waited(self) -> float:
        """Seconds for which batches were waited for: on a GPU, those in which it had nothing to compute meanwhile.

        The last ones count once the GPU has come to them.
        """
        self._count_waits()
        return self._waited

    @property
    def waited_ahead(self) -> float:
        """The part of `waited` that was spent in `read_ahead`."""
        self._count_waits()
        return self._waited_ahead

    def __iter__(self) -> "DeviceBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self._read(is_ahead=False) if self.ahead is None else self.ahead
        self.ahead = None
        if self.stream is None:
            return batch
        queue = torch.cuda.current_stream(self.device)
        queue.wait_stream(self.stream)
        for name in ON_DEVICE & batch.keys():
            batch[name].record_stream(queue)  # its memory is of the other stream
        return batch

    def end(self) -> None:
        """Ends the loader, whoever else still holds these batches, as the traceback of an exception does."""
        self.source, self.ahead = iter(()), None

    def read_ahead(self) -> None:
        """On a GPU, starts to copy the next micro-batch there, if there is one; call it when the GPU has work."""
        if self.stream is not None and self.ahead is None:
            try:
                self.ahead = self._read(is_ahead=True)
            except StopIteration:
                self.ahead = None

    def _read(self, is_ahead: bool) -> dict[str, Any]:
        if self.stream is None:
            asked = time.monotonic()
            batch = next(self.source)
            self._waited += time.monotonic() - asked
            return batch
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        queue = torch.cuda.current_stream(self.device)
        before.record(queue)  # the GPU comes to it when it has computed all that it was given
        batch = next(self.source)
        after.record(queue)
        self._waits.append((before, after, is_ahead))
        with torch.cuda.stream(self.stream):
            copied = {name: batch[name].to(self.device, non_blocking=True) for name in ON_DEVICE & batch.keys()}
            return batch | copied | {"host": batch}

    def _count_waits(self) -> None:
        while self._waits and self._waits[0][1].query():
            before, after, is_ahead = self._waits.pop(0)
            seconds = before.elapsed_time(after) / 1000
            self._waited += seconds
            self._waited_ahead += seconds if is_ahead else 0.0
