"""The DeepSpeed engine: building it from ds_configs/, one optimizer step, and its weights."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvd.batch import Batch
from mvd.config import ConfigError, Precision

if TYPE_CHECKING:

    class Engine(nn.Module):
        """The part of DeepSpeedEngine that the harness uses; DeepSpeed itself has no type hints."""

        module: nn.Module
        optimizer: Any  # ours at ZeRO stage 0, DeepSpeed's wrapper of it above
        checkpoint_engine: Any
        _copy_recovery_script: Any
        allreduce_bucket: Callable[..., Tensor]
        unflatten: Callable[[Tensor, list[Tensor]], list[Tensor]]
        allreduce_and_copy: Callable[..., None]

        def backward(self, loss: Tensor) -> Tensor: ...
        def step(self) -> None: ...
        def zero_optimization_stage(self) -> int: ...
        def get_global_grad_norm(self) -> float: ...
        def save_checkpoint(self, save_dir: str, tag: str, save_latest: bool) -> bool: ...
        def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, dict[str, Any]]: ...
        def destroy(self) -> None: ...
else:
    from deepspeed import DeepSpeedEngine as Engine

__all__ = ["Engine", "build_engine", "full_state_dict", "load_deepspeed_config", "take_step"]

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

# Settings of the recipe: in a file of ds_configs/ they would change the result without changing the stage id.
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


def load_deepspeed_config(name: str) -> dict[str, Any]:
    """The content of ds_configs/<name>.json.

    Raises:
        ConfigError: there is no such file, it is not JSON, or it sets what the recipe decides.
    """
    path = DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"no DeepSpeed configuration is called {name!r}; use one of {known}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fix it") from error
    forbidden = sorted(ROW_KEYS & config.keys())
    if forbidden:
        raise ConfigError(f"{path} sets {', '.join(forbidden)}, which the recipe decides; remove it from the file")
    return config


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config_name: str, batch: Batch, precision: Precision
) -> Engine:
    """Wraps a model and a torch optimizer (DeepSpeed's own optimizers compile C++ extensions when they are built).

    precision: "bf16" runs forward and backward passes under autocast; weights, gradients and optimizer stay fp32.
    """
    config = load_deepspeed_config(config_name) | {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # otherwise gradients are reduced in bf16
        },
    }
    engine: Engine
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.allreduce_and_copy = partial(_reduce, engine)
    return engine


def _reduce(engine: Engine, gradients: list[Tensor], group: dist.ProcessGroup, world_size: int) -> None:
    """DeepSpeed's mean of gradients over all ranks at ZeRO stage 0, copied back by one operation instead of many."""
    reduced = engine.allreduce_bucket(gradients, group, world_size)
    torch._foreach_copy_(gradients, engine.unflatten(reduced, gradients))


def take_step(engine: Engine) -> float:
    """Makes an optimizer step with the accumulated gradient and returns the gradient's L2 norm over all parameters.

    If the gradient is not finite, every process skips the step and returns NaN. ZeRO does both itself; at stage 0,
    where every process has the whole gradient, it is done here.
    """
    norm: float | None = None
    if engine.zero_optimization_stage() == 0:
        norm = float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
        if not math.isfinite(norm):
            engine.module.zero_grad(set_to_none=True)  # the optimizer ignores parameters without a gradient
    engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    return norm if 0 <= norm < math.inf else math.nan  # ZeRO returns inf or -1 for a gradient that is not finite


def full_state_dict(engine: Engine) -> dict[str, Tensor]:
    """All weights in fp32 on the CPU of rank 0, {} on the others; every rank must call it (ZeRO-3)."""
    state: dict[str, Tensor] = {}
    for name, weight in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
            if dist.get_rank() == 0:
                state[name] = weight.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state
