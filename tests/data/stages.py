"""Small stages over the generated motion data set."""

from pathlib import Path
from typing import Any

from mvd.config import Augmentation, Finetune, ImageTeacher, Mixing, Optimization, Pretrain, VideoTeacher
from mvd.config.run_settings import DatasetPaths
from mvd.stage import Execution, Stage


def optimization(global_batch: int, epochs: int) -> Optimization:
    return Optimization(
        global_batch=global_batch,
        epochs=epochs,
        warmup_epochs=0,
        base_lr=1e-3,
        min_lr=0.0,
        betas=(0.9, 0.95),
        micro_batch=global_batch,
    )


def recipe(kind: str, global_batch: int = 16, epochs: int = 2, seed: int = 0, **fields: Any) -> Any:
    common = {"dataset": "motion", "optimization": optimization(global_batch, epochs), "seed": seed}
    if kind == "image_teacher":
        return ImageTeacher(**{"size": "tiny", **common, **fields})
    if kind == "video_teacher":
        return VideoTeacher(**{"size": "tiny", "stride": 1, **common, **fields})
    if kind == "pretrain":
        return Pretrain(**{"student": "tiny", "teacher": "tiny", "stride": 1, **common, **fields})
    defaults = {"size": "tiny", "sampling": "dense", "stride": 1, "drop_path": 0.0, "mixing": Mixing(group=8)}
    return Finetune(**{**defaults, **common, **fields})


# A square as large as the 64 x 48 frame does not fit into it, so the crop is always the central 48 x 48.
PLAIN = Augmentation(auto=None, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, erase=0.0)


def stage(root: Path, kind: str, *, world_size=1, micro_batch=16, workers=0, **fields: Any) -> Stage:
    made = recipe(kind, **fields)
    execution = Execution(
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=made.optimization.global_batch // (world_size * micro_batch),
        data=DatasetPaths(root=str(root)),
        workers=workers,
    )
    return Stage(kind=kind, id=f"{kind}-test", recipe=made, execution=execution)
