"""Processes and the DeepSpeed engine: one code path for CPU (gloo) and GPU (NCCL)."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mvd.batch import Batch
from mvd.config import ConfigError, Precision
from mvd.host import hostname
from mvd.models.checkpoints import LoadReport, load_official

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # says so before DeepSpeed looks for a GPU and warns
import deepspeed  # noqa: E402
from deepspeed import DeepSpeedEngine as Engine  # noqa: E402

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

# These belong to the row; a ds_configs file that sets them would change a result behind the recipe's back.
ROW_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "torch_autocast",
    "fp16",
    "bf16",
}


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start_processes() -> Process:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without these variables the process stays alone. The device is the local rank's GPU, else the CPU.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ build of about half a minute
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return Process(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def load_deepspeed_config(name: str) -> dict[str, Any]:
    """ds_configs/<name>.json; ConfigError where there is none, or where it sets what belongs to the row."""
    path = DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"no DeepSpeed configuration is called {name!r}; use one of {known}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); mend it") from error
    forbidden = sorted(ROW_KEYS & config.keys())
    if forbidden:
        raise ConfigError(f"{path} sets {', '.join(forbidden)}, which belongs to the row; remove it from the file")
    return config


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config_name: str, batch: Batch, precision: Precision
) -> Engine:
    """Wraps the model and its own optimizer (DeepSpeed would compile one); bf16 means autocast over fp32 weights."""
    config = load_deepspeed_config(config_name) | {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # else gradients are summed across GPUs in bf16
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def take_step(engine: Engine) -> float:
    """Applies the accumulated gradient and returns its 2-norm over all parameters.

    A gradient that is not finite is dropped instead, on every process, and NaN returned. ZeRO computes the norm and
    does so itself; stage 0 does not, and there every process holds the whole gradient.
    """
    norm = None
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            engine.module.zero_grad(set_to_none=True)  # the optimizer passes over what has no gradient
    engine.step()
    norm = float(engine.get_global_grad_norm() if norm is None else norm)
    return norm if 0 <= norm < math.inf else math.nan  # ZeRO says inf or -1


def full_state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights in fp32 on the CPU of rank 0, empty elsewhere; gathers ZeRO-3's shards, so every rank calls it."""
    state = {}
    for name, weight in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
            if dist.get_rank() == 0:
                state[name] = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def load_weights(model: nn.Module, path: str) -> LoadReport:
    """Loads a file in official layout on every process; the first says in one line what was used and ignored.

    Raises:
        CheckpointError: the file does not fit, cannot be read or is not safe.
    """
    report = load_official(model, path)
    if dist.get_rank() == 0:
        print(f"{path}: {report}", flush=True)
    return report


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agreeing() -> Iterator[None]:
    """Ends all processes together where some meet a ConfigError, so that none waits for one that is gone.

    The first of those raises its error, the other processes leave with exit status 2: the message comes once. In the
    block, nothing that can raise it on some processes alone may come before something that all do together.
    """
    error = None
    try:
        yield
    except ConfigError as caught:
        error = caught
    failed = [rank for rank, fails in enumerate(gather(error is not None)) if fails]
    if error is not None and failed[0] == dist.get_rank():
        raise error
    if failed:
        raise SystemExit(2)


class PeerLost(RuntimeError):
    """Another process of the run, or a loader process of this one, is gone; the run can be started again."""


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Says in a sentence what a collective or a loader says of a process that is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        who = f"rank {dist.get_rank()} on {hostname()}"
        if "DataLoader worker" in reason:
            raise PeerLost(f"{who} has lost a process that reads its data ({reason}); start the stage again") from error
        if isinstance(error, dist.DistError) or "gloo" in reason or "Connection" in reason:
            raise PeerLost(f"{who} has lost another process of the run ({reason}); start the stage again") from error
        raise


def mean_across_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
