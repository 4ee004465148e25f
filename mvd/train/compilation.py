"""torch.compile of the transformer blocks of a run's networks.

Block by block: the blocks of a network have the same shapes, so that a few graphs, compiled within a minute or two,
serve all of them, and what is not compiled, such as the masking, costs little.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mvd.distributed.process import Process
from mvd.files import write_atomically
from mvd.models.encoder import Blocks
from mvd.stage import Stage
from mvd.train.engine import Engine

logger = logging.getLogger(__name__)

BACKEND = "inductor"
GRAPHS = 64  # at most, of one class of blocks; PyTorch's own limit is 8

Result = TypeVar("Result")


class Compilation:
    """Compiles the blocks of the trained network and of the teachers, as `compile` of the profile says.

    Where compiling fails, this process goes on without, with a warning that says why. What was compiled is kept in
    the run directory, so that the next attempt starts fast.

    engine: with the network that is trained. teachers: may contain that network too.
    failed: whether compiling has failed in this process, for any of its runs: PyTorch is then told to compile nothing.
    """

    failed = False

    def __init__(self, stage: Stage, process: Process, engine: Engine, teachers: Sequence[nn.Module]) -> None:
        asked = stage.execution.compile
        self.wanted = process.device.type == "cuda" if asked is None else asked
        self.cache = stage.files.compile_cache
        self.writes_cache = process.is_first
        if self.wanted and engine.zero_optimization_stage() == 3:
            self.wanted = False  # its hooks, which gather a layer's weights, cannot be compiled
            logger.warning("compile: blocks are not compiled under ZeRO-3; use zero0, zero1 or zero2")
        if self.is_on:
            self._configure()
            compile_blocks(*dict.fromkeys([engine.module, *teachers]))

    @property
    def is_on(self) -> bool:
        """Whether blocks are compiled."""
        return self.wanted and not Compilation.failed

    def _configure(self) -> None:
        import torch._dynamo
        import torch._functorch.config
        import torch._inductor.config

        torch._dynamo.config.recompile_limit = GRAPHS
        torch._functorch.config.force_non_lazy_backward_lowering = True  # a failure then shows in the forward pass
        torch._inductor.config.deterministic = True  # no kernel is chosen by its speed: restarts are bit-equal
        torch._inductor.config.compile_threads = 1  # the job's signals would end processes of its own
        with contextlib.suppress(FileNotFoundError):
            self._load(self.cache.read_bytes())

    def _load(self, artifacts: bytes) -> None:
        try:
            torch.compiler.load_cache_artifacts(artifacts)
        except Exception as error:  # as of another version of PyTorch: only time is lost
            logger.warning("compile: %s cannot be used (%s); compiling again", self.cache, _in_short(error))

    def run(self, forward: Callable[[], Result]) -> Result:
        """The result of a forward pass; it runs a second time, without compilation, if compiling fails."""
        try:
            return forward()
        except Exception as error:
            if not self.is_on or not _is_of_the_compiler(error):
                raise
            logger.warning("compile: compiling failed (%s); this process continues without", _in_short(error))
            Compilation.failed = True
            torch.compiler.set_stance("force_eager")
        return forward()

    def paused(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which nothing is compiled, as for evaluations, whose batches have other shapes."""
        return torch.compiler.set_stance("force_eager") if self.is_on else contextlib.nullcontext()

    def keep(self) -> None:
        """Writes what was compiled to the run directory; call it after an update."""
        if not self.is_on or not self.writes_cache:
            return
        self.writes_cache = False
        artifacts = torch.compiler.save_cache_artifacts() if _something_is_new() else None
        if artifacts is not None:
            try:
                write_atomically(self.cache, lambda temporary: temporary.write_bytes(artifacts[0]))
            except OSError as error:
                logger.warning("compile: %s cannot be written (%s)", self.cache, error)


def compile_blocks(*networks: nn.Module) -> None:
    """Has each transformer block of the networks compiled when it is first called."""
    for network in networks:
        for blocks in network.modules():
            for block in blocks if isinstance(blocks, Blocks) else ():
                block.compile(backend=BACKEND, fullgraph=True, dynamic=False)


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)


def _something_is_new() -> bool:
    """Whether anything was compiled that no cache had."""
    from torch._dynamo.utils import counters

    return counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"] > 0


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
