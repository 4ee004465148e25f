"""A stage: one recipe, what it starts from and how it is executed; its file, and the identity that names it.

Free of torch, so that the launcher starts in a moment.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from mvd.config import RECIPES, ConfigError, Kind, Precision, Recipe, merge_typed
from mvd.sizes import SIZES, Size

WEIGHTS = "weights.safetensors"  # what a training stage leaves in its run directory
Reader = Literal["pyav", "decord"]


@dataclass(frozen=True, kw_only=True)
class DatasetPaths:
    """Where a data set lies: annotation files relative to the root, or absolute."""

    root: str
    train: str = "train.csv"
    val: str = "val.csv"
    test: str = "test.csv"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a run puts up with, and for how long, before it stops (cluster.example.yaml explains each)."""

    save_failures: int = 5
    save_again_seconds: float = 300.0
    bad_updates: int = 3
    spike_factor: float | None = 3.0
    spike_rollback: bool = False
    hang_minutes: float = 15.0
    video_seconds: float = 120.0
    unreadable_share: float = 0.02

    def __post_init__(self) -> None:
        for name in ("save_failures", "save_again_seconds", "bad_updates", "hang_minutes", "video_seconds"):
            if not getattr(self, name) > 0:  # nor is NaN
                raise ConfigError(f"faults.{name} is {getattr(self, name)}; give a positive number")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ConfigError(f"faults.spike_factor is {self.spike_factor}; give a number above 1, or null")
        if not 0 <= self.unreadable_share <= 1:
            raise ConfigError(f"faults.unreadable_share is {self.unreadable_share}; keep it between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How and where a stage runs: everything that must not change its result.

    micro_batch counts samples (videos in fine-tuning) of one process and forward pass. deepspeed names a file of
    ds_configs/. checkpoint_every counts updates, validate_every and keep_every_epochs epochs, log_every updates;
    workers are loader processes of one training process. shards: jobs of `world_size` processes each that a test is
    split over, of which this is number `shard`.
    """

    world_size: int = 1
    shards: int = 1
    shard: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    deepspeed: str = "zero1"
    precision: Precision = "bf16"
    runs: str = "runs"
    data: DatasetPaths | None = None
    reader: Reader = "pyav"
    workers: int = 8
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 15.0
    keep_checkpoints: int = 2
    keep_every_epochs: int | None = None
    faults: Faults = Faults()
    validate_every: int = 5
    log_every: int = 10


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of a plan, complete: what `mvd.run.run_stage` needs and nothing else.

    inputs: role (image_teacher, video_teacher, pretrain, finetune) -> file with its weights.
    digests: role -> sha256 of an input that was given as a file, as its content was when the stage got its id.
    """

    kind: Kind
    id: str
    recipe: Any
    inputs: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        expected = RECIPES[self.kind]
        if not isinstance(self.recipe, expected):
            given = type(self.recipe).__name__
            raise ConfigError(f"stage {self.id}: a {self.kind} takes a {expected.__name__} recipe, not {given}")

    @property
    def directory(self) -> Path:
        """The stage's run directory."""
        return Path(self.execution.runs) / self.id

    @property
    def job_directory(self) -> Path:
        """Where one job of the stage keeps what is its own: the run directory, or a shard's folder in it."""
        how = self.execution
        return self.directory / "shards" / f"{how.shard:04d}-of-{how.shards:04d}" if how.shards > 1 else self.directory

    def in_shards(self) -> list["Stage"]:
        """The stage as each of its jobs runs it."""
        executions = (dataclasses.replace(self.execution, shard=shard) for shard in range(self.execution.shards))
        return [dataclasses.replace(self, execution=execution) for execution in executions]

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Stage":
        """Reads stage.yaml back, typed; ConfigError where a field is unknown, missing or of a wrong type."""
        try:
            raw = OmegaConf.merge({"digests": {}}, OmegaConf.load(path))  # older files have none
            odd = sorted(set(raw) ^ {f.name for f in dataclasses.fields(cls)})
            if odd:
                raise ValueError(f"{', '.join(odd)} is unknown or missing")
            recipe_type = RECIPES[raw.kind]
            recipe = OmegaConf.to_object(merge_typed(OmegaConf.structured(recipe_type), raw.recipe))
            execution = OmegaConf.to_object(merge_typed(OmegaConf.structured(Execution), raw.execution))
            inputs, digests = OmegaConf.to_container(raw.inputs), OmegaConf.to_container(raw.digests)
            return cls(kind=raw.kind, id=raw.id, recipe=recipe, inputs=inputs, digests=digests, execution=execution)
        except ConfigError:
            raise
        except Exception as error:
            first_line = str(error).splitlines()[0]
            raise ConfigError(
                f"{path} is not a stage this version can run: {first_line}; submit the row again"
            ) from error


def identity(value: Any) -> Any:
    """The part of a recipe that decides its result, as plain containers."""
    if dataclasses.is_dataclass(value):
        return {f.name: identity(getattr(value, f.name)) for f in dataclasses.fields(value) if _decides(f, value)}
    if isinstance(value, dict):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # 40 and 40.0 are one setting, whichever a row file wrote
    return [identity(v) for v in value] if isinstance(value, list | tuple) else value


def _decides(setting: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field belongs to the identity of a settings dataclass."""
    if getattr(value, setting.name) is None and not setting.metadata.get("digest_unset", True):
        return False
    return setting.metadata.get("digest", True)


def sizes_of(recipe: Recipe) -> dict[str, Size]:
    """The geometry behind the size names of a recipe."""
    names = (getattr(recipe, key, None) for key in ("size", "student", "teacher"))
    return {name: SIZES[name] for name in names if name is not None}


def stage_id(kind: str, name: str, recipe: Recipe, input_ids: dict[str, str]) -> str:
    """`<kind>-<name>-<8 hex>`; the digest covers the recipe, the geometry its sizes stand for, and its inputs' ids."""
    facts = {"kind": kind, "recipe": identity(recipe), "sizes": identity(sizes_of(recipe)), "inputs": input_ids}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{kind}-{name}-{digest}"
