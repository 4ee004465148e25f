"""The DeepSpeed engine: building it from ds_configs/, one optimizer step, and its weights."""

import json
import math
from pathlib import Path
from typing import Any

import deepspeed  # noqa: E402
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine as Engine  # noqa: E402
from torch import nn

from mvd.batch import Batch
from mvd.config import ConfigError, Precision

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
