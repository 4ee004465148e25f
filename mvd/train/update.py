"""One update in progress: the forward and backward passes of its micro-batches, then the optimizer step."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvd.data.device_batches import DeviceBatches
from mvd.distributed.process import PendingMean
from mvd.distributed.watchdog import heartbeat
from mvd.train.compilation import Compilation
from mvd.train.engine import Engine, take_step
from mvd.train.sample_seeded_dropout import SampleSeededLayers
from mvd.train.tasks import Task


class ForwardPass:
    """The losses of micro-batches, with compiled blocks where that is on, and with the draws of their samples."""

    def __init__(
        self, engine: Engine, task: Task, layers: SampleSeededLayers, compilation: Compilation, device: torch.device
    ) -> None:
        self.engine, self.task, self.layers, self.compilation, self.device = engine, task, layers, compilation, device

    def losses(self, raw: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See Task.losses. raw: as the loader gives it. batch: prepared, on the device."""
        self.layers.draw(raw["layer_seeds"], self.device)
        return self.compilation.run(partial(self.task.losses, self.engine, batch))


class Update:
    """Collects what the update needs from one micro-batch to the next. number: of the update, counted from 1."""

    def __init__(self, forward: ForwardPass, batches: DeviceBatches, number: int, micro_batches: int) -> None:
        self.forward, self.engine, self.batches = forward, forward.engine, batches
        self.number, self.micro_batches = number, micro_batches
        self.started, self.waited_before = time.monotonic(), batches.waited
        self.waited_ahead_before = 0.0
        self.losses: list[Tensor] = []  # of each micro-batch, (names,)
        self.raws: list[dict[str, Any]] = []  # the micro-batches as the loader gave them, on the host
        self.names: list[str] = []
        self.agreed: PendingMean | None = None

    @property
    def waited(self) -> float:
        """Seconds that the update has waited for data; all of them once its step has been made."""
        return self.batches.waited - self.waited_before

    @property
    def waited_ahead(self) -> float:
        """The part of `waited` after the last forward pass: for the data of the next update."""
        return self.batches.waited_ahead - self.waited_ahead_before

    def learn(self, raw: dict[str, Any], batch: dict[str, Tensor], flags: Callable[[], tuple[bool, ...]]) -> None:
        """Adds the gradient of one micro-batch.

        raw: as the loader gives it. batch: prepared, on the device. flags: of this process, asked for after the last
        forward pass; the other ranks learn them with the losses.
        """
        self.raws.append(raw.get("host", raw))
        heartbeat("in forward and backward", self.number)
        if self.losses:
            self.engine.step()  # within an update it only counts the micro-batch
        named = self.forward.losses(raw, batch)
        self.losses.append(torch.stack([loss.detach().float() for loss in named.values()]))
        self.names, loss = list(named), named["loss"]
        if len(self.losses) == self.micro_batches:
            losses = torch.stack(self.losses)
            self.waited_ahead_before = self.batches.waited_ahead
            self.agreed = self._agree(losses, flags())
            loss = loss * (1 + 0 * losses.sum())  # NaN on one rank: all gradients are, all skip it
        self.engine.backward(loss)

    def _agree(self, losses: Tensor, flags: tuple[bool, ...]) -> PendingMean:
        """Starts the mean over all ranks: of the losses, (micro-batches, names), and of the flags."""
        heartbeat("waiting for the others' losses", self.number)
        asked = torch.tensor(flags, dtype=losses.dtype).to(losses.device, non_blocking=True)
        pending = PendingMean(torch.cat([losses.mean(dim=0), asked]))
        heartbeat("in forward and backward", self.number)
        return pending

    def step(self, check: Callable[["Update", dict[str, float]], None]) -> tuple[dict[str, float], list[float]]:
        """Makes the optimizer step; returns the means of the losses with grad_norm, and of the flags.

        check: is called with the means of the losses before the weights change.
        """
        if self.agreed is None:
            raise RuntimeError(f"update {self.number} needs {self.micro_batches} micro-batches, got {len(self.losses)}")
        self.agreed.start_copy()
        heartbeat("reading videos", self.number)
        self.batches.read_ahead()
        heartbeat("updating weights", self.number)
        means = self.agreed.read()
        losses = dict(zip(self.names, means, strict=False))
        check(self, losses)
        return losses | {"grad_norm": take_step(self.engine)}, means[len(losses) :]

    def suspects(self, values: dict[str, float]) -> tuple[str, list[int]]:
        """What is not finite, "loss" or "gradient", and the files of this process that may be the cause.

        Those of its non-finite losses, or all if the gradient is at fault. values: as `step` returns them.
        """
        lossy = not all(math.isfinite(values[name]) for name in self.names)
        finite = torch.stack(self.losses).isfinite().all(dim=1).tolist()
        suspects = [
            raw["indices"].tolist() for raw, fine in zip(self.raws, finite, strict=True) if not (lossy and fine)
        ]
        return "loss" if lossy else "gradient", [index for part in suspects for index in part]
