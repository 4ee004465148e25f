"""Forward passes that other processes repeat: another result shows a machine that computes wrongly without an error.

A micro-batch is sent to the other process as the loader gave it, with the masks and the seeds of all draws. So reading,
decoding and augmenting are not checked; nor are the backward pass and the optimizer's step, which the forward passes
share their hardware with. Random states, weights and data stay as they are.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from mvd.config import Precision
from mvd.data.on_device import prepare
from mvd.distributed.device import hardware
from mvd.distributed.process import Process, gather, pass_on, share
from mvd.distributed.watchdog import heartbeat
from mvd.host import hostname
from mvd.stage import Stage
from mvd.train.bad_updates import BadUpdates
from mvd.train.random_state import random_state, restore_random_state
from mvd.train.replicas import Replicas, go_back
from mvd.train.update import ForwardPass, Update

logger = logging.getLogger(__name__)

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 2e-2}  # relative, between different kinds of hardware

RawBatch = dict[str, Any]


class Claim(NamedTuple):
    """The losses that a process computed for a micro-batch, and on what hardware."""

    rank: int
    losses: tuple[float, ...]
    hardware: str


Agreement = Callable[[Claim, Claim], bool]


class Audits:
    """Compares replicas and repeats forward passes on other processes; all processes call its methods together.

    Where numbers differ, they raise RollBack, or HostFault if a process repeats its wrong result, or if they differ for
    the second time after a checkpoint. newest: finishes the checkpoint in progress; returns the update of the newest.
    """

    def __init__(
        self,
        stage: Stage,
        process: Process,
        forward: ForwardPass,
        bad_updates: BadUpdates,
        newest: Callable[[], int],
    ) -> None:
        self.stage, self.process, self.forward = stage, process, forward
        self.bad_updates, self.newest = bad_updates, newest
        self.replicas = Replicas(stage, process, forward.engine, forward.task.watched)
        self.every = stage.execution.faults.audit_every if process.world_size > 1 else 0
        self.tolerance = TOLERANCE[stage.execution.precision]
        self.latest: RawBatch | None = None  # the micro-batch that was trained on last
        self.audited = 0  # update of the last audit
        self.exact = True  # until it turns out that this hardware rounds otherwise each time

    def check(self, update: int, before_save: bool = False) -> None:
        """Compares the weights of all processes, and repeats each one's latest micro-batch on the process before it.

        Each if it is due after this update, as both are before a save: so every checkpoint has passed an audit. Losses
        must be equal bit for bit on the same kind of hardware, and up to a tolerance otherwise.
        """
        self.replicas.compare(update, self.newest, before_save)
        due = self.every > 0 and (before_save or update % self.every == 0)
        if due and self.audited != update and self.latest is not None:
            self.audited = update
            heartbeat("repeating another process's losses", update)
            self._compare([self.latest], [], "audit", update)

    def recompute_if_bad(self, update: Update, losses: Mapping[str, float]) -> None:
        """Computes the losses of a bad update twice more, here and on another process; call it before the step.

        The same results again mean that data or numerics are bad; after another one, the update is made again. They may
        differ by a tolerance, since the losses of a bad update and those of a good one are far from each other.

        losses: the means over all processes.
        """
        self.latest = update.raws[-1]
        if self.bad_updates.is_bad(losses):
            heartbeat("recomputing the losses", update.number)
            self._compare(update.raws, torch.stack(update.losses).tolist(), "recomputed", update.number)
            heartbeat("updating weights", update.number)

    def _compare(
        self,
        raws: Sequence[RawBatch],
        before: Sequence[Sequence[float]],
        fault: str,
        update: int,
    ) -> None:
        """before: the losses that training has computed for each of the micro-batches, to be compared too."""
        same = partial(agree, tolerance=self.tolerance, exact=self.exact and not before)
        for place, raw in enumerate(raws):
            trained = [self._claim(tuple(before[place]))] if before else []
            others = [self._repeat(pass_on(raw, self.process))] if self.process.world_size > 1 else []
            found: list[tuple[list[Claim], list[Claim]]] = gather(([*trained, self._repeat(raw)], others))
            for author in range(len(found)):
                claims = [*found[author][0], *found[author - 1][1]]
                if not all(same(claim, claims[0]) for claim in claims):
                    self.replicas.compare_now(update, self.newest)  # other weights would explain other losses
                    votes: list[Claim] = gather(self._repeat(share(raw, source=author)))
                    self._name(claims, votes, same, fault, update)

    def _name(self, claims: list[Claim], votes: list[Claim], same: Agreement, fault: str, update: int) -> None:
        """Names the processes whose losses are not those of the majority. votes: of all processes, computed again."""
        hosts: list[str] = gather(hostname())

        def told(claims: Iterable[Claim]) -> str:
            last = {claim.rank: claim.losses[0] for claim in claims}
            return ", ".join(f"rank {rank} on {hosts[rank]} got {loss:.9g}" for rank, loss in last.items())

        usual = majority(votes, same)
        if usual is None and self._only_rounds([*votes, *claims]):
            return
        if usual is None:
            message = f"the losses of the same micro-batch differ, and most processes do not agree: {told(votes)}"
            go_back(self.stage, self.process, fault, message, update, [], self.newest)
        wrong = [claim for claim in (*votes, *claims) if not same(claim, usual)]
        if wrong:
            message = f"{told(wrong)} as the loss of a micro-batch for which most processes get {usual.losses[0]:.9g}"
            blamed, repeats = [hosts[claim.rank] for claim in wrong], wrong[0] in votes
            go_back(self.stage, self.process, fault, message, update, blamed, self.newest, repeats)

    def _only_rounds(self, claims: Sequence[Claim]) -> bool:
        """Whether results that hardly two processes share differ by rounding; from then on that is no difference."""
        if not all(agree(claim, claims[0], self.tolerance, exact=False) for claim in claims):
            return False
        if self.exact and self.process.is_first:
            logger.warning(
                "audits: forward passes round otherwise each time; they are compared up to %g", self.tolerance
            )
        self.exact = False
        return True

    def _claim(self, losses: tuple[float, ...]) -> Claim:
        kind = f"{hardware(self.process.device)}, {'compiled' if self.forward.compilation.is_on else 'not compiled'}"
        return Claim(self.process.rank, losses, kind)

    def _repeat(self, raw: RawBatch) -> Claim:
        """The forward pass of a micro-batch as in training, with the weights as they are now.

        It records what a backward pass would need, since blocks are compiled for that; except under ZeRO-3, which is
        not compiled, and counts such passes.
        """
        state = random_state()
        torch.manual_seed(0)  # the same on all processes; the networks draw from the seeds in the batch
        try:
            batch = prepare(raw, self.stage.recipe, self.process.device)
            with torch.set_grad_enabled(self.forward.engine.zero_optimization_stage() < 3):
                named = self.forward.losses(raw, batch)
        finally:
            restore_random_state(state)
        return self._claim(tuple(torch.stack([loss.detach().float() for loss in named.values()]).tolist()))


def agree(one: Claim, other: Claim, tolerance: float, exact: bool) -> bool:
    """Whether two results are the same. exact: bit for bit, if they are of the same kind of hardware."""
    allowed = 0.0 if exact and one.hardware == other.hardware else tolerance
    return all(
        math.isclose(mine, its, rel_tol=allowed) or not (math.isfinite(mine) or math.isfinite(its))
        for mine, its in zip(one.losses, other.losses, strict=True)
    )


def majority(votes: Sequence[Claim], same: Agreement) -> Claim | None:
    """A vote that more than half of all are the same as; None if there is none, as of two that differ."""
    counts = [sum(same(vote, other) for other in votes) for vote in votes]
    most = max(counts)
    return votes[counts.index(most)] if 2 * most > len(votes) else None
