"""Weights that must be equal on all ranks: a difference is a wrong number that no error has shown."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

import torch
from torch import Tensor, nn

from mvd.distributed.faults import HostFault, record_fault
from mvd.distributed.process import Process, gather
from mvd.host import hostname
from mvd.stage import Stage
from mvd.train.bad_updates import RollBack
from mvd.train.engine import Engine

RETURNS: set[tuple[str, str, int]] = set()  # of this process: stage, kind of fault, update that was gone back to
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size


class Replicas:
    """Compares checksums of the weights of all ranks; all processes call its methods together.

    Of the trained network, all weights under ZeRO-0 to 2 and those that are not divided under ZeRO-3; and all weights
    of the teachers. Optimizer states are not compared: under ZeRO-1 and up, each rank has its own.

    teachers: may contain the trained network too.
    """

    def __init__(self, stage: Stage, process: Process, engine: Engine, teachers: Sequence[nn.Module]) -> None:
        self.stage, self.process = stage, process
        self.every = stage.execution.faults.compare_every if process.world_size > 1 else 0
        self.networks = list(dict.fromkeys([engine.module, *teachers]))
        self.compared = 0  # update of the last comparison

    def compare(self, update: int, newest: Callable[[], int], before_save: bool = False) -> None:
        """Compares the weights after an update, if that is due, as it is before each save, and not done yet.

        newest: finishes the checkpoint in progress and returns the update of the newest one. The weights were compared
        before it was saved.

        Raises:
            RollBack: they differ. The rank that differs from most others is recorded, and its host blamed.
            HostFault: they differ again after a return to the same checkpoint.
        """
        due = self.every > 0 and (before_save or update % self.every == 0)
        if due and self.compared != update:
            self.compared = update
            self.compare_now(update, newest)

    def compare_now(self, update: int, newest: Callable[[], int]) -> None:
        """As `compare`, whether it is due or not."""
        sums = dict(self._checksums())
        own: list[int] = torch.stack(list(sums.values())).tolist() if sums else []  # ZeRO-3 may divide everything
        digests: list[int] = gather(hash(tuple(own)))
        if len(set(digests)) == 1:
            return
        where = next(name for name, *values in zip(sums, *gather(own), strict=True) if len(set(values)) > 1)
        guilty, hosts = odd_ones(digests), gather(hostname())
        ranks = guilty or range(len(digests))
        said = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
        what = "has other weights than most ranks" if guilty else "have different weights, and most do not agree"
        message = f"{said} {what}, first in {where}"
        go_back(self.stage, self.process, "replicas", message, update, [hosts[rank] for rank in guilty], newest)

    def _checksums(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight's name and the sum of its bits read as integers, an int64 scalar, whatever their order."""
        for network in self.networks:
            for name, weight in network.state_dict(keep_vars=True).items():
                if weight.numel() and getattr(weight, "ds_persist", True):  # False for what ZeRO-3 divides
                    bits = weight.detach().contiguous().view(BITS[weight.element_size()])
                    yield f"{type(network).__name__}.{name}", bits.sum(dtype=torch.int64)


def go_back(
    stage: Stage,
    process: Process,
    kind: str,
    message: str,
    update: int,
    hosts: Sequence[str],
    newest: Callable[[], int],
    repeats: bool = False,
) -> NoReturn:
    """Records wrong numbers of some hosts as a fault, and ends what the run has computed since its last checkpoint.

    newest: see Replicas.compare. repeats: whether a host is known to compute wrongly still.

    Raises:
        RollBack: on every process.
        HostFault: a host repeats it, or the same kind of fault came after the same checkpoint before; on every process.
    """
    checkpoint = newest()
    earlier = []
    with suppress(OSError):  # of a disk that fails; this process knows what it has returned from itself
        earlier = stage.files.read_faults() if process.is_first else []
    again = any(fault["fault"] == kind and fault["update"] > checkpoint for fault in earlier)
    again |= (stage.id, kind, checkpoint) in RETURNS  # a full disk may have taken no record of it
    RETURNS.add((stage.id, kind, checkpoint))
    again, repeats = gather((again, repeats))[0]
    if process.is_first:
        record_fault(stage.files, kind, message, update, sorted(set(hosts)))
    if repeats:
        raise HostFault(f"{stage.id}: {message}, repeatedly; start it again on other hosts")
    if again:
        raise HostFault(f"{stage.id}: {message}, again after a return to update {checkpoint}")
    raise RollBack(message)


def odd_ones(values: Sequence[int]) -> list[int]:
    """The places of the values that differ from the most common one; none if no value is the most common."""
    (usual, count), *others = Counter(values).most_common()
    if others and others[0][1] == count:
        return []
    return [place for place, value in enumerate(values) if value != usual]
