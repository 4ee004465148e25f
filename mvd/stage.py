"""A stage: a recipe, its inputs and its execution; and its file, stage.yaml.

Must not import torch: that keeps the launcher's start-up fast.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mvd.config import RECIPES, ConfigError, DatasetPaths, Kind, Precision, RunSettings
from mvd.config.typed import merge_typed
from mvd.files import DISK_FAULTS
from mvd.run_directory import RunDirectory

# Settings that every version has written: without them a file is not old but has been cut off.
WRITTEN_BY_ALL = {"world_size", "micro_batch", "accumulation", "deepspeed", "precision", "runs", "data"}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """That a stage is only rehearsed (mvd.rehearsal), in a run directory of its own.

    updates: of a training stage, before it saves. random_weights: roles of inputs that random weights stand in for.
    generated_data: whether generated samples stand in for the data set. resume_from: the run directory of a rehearsal
    on another number of GPUs, whose checkpoint this one resumes, and then deletes. keep_checkpoint: whether another
    rehearsal will resume this one's.
    """

    updates: int = 40
    random_weights: list[str] = field(default_factory=list)
    generated_data: bool = False
    resume_from: str | None = None
    keep_checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class Execution(RunSettings):
    """How and where a stage runs: everything that does not change its result.

    micro_batch: samples (videos in fine-tuning) per process and forward pass. batch_parts: equal parts of the global
    batch that are divided among the processes one after the other, as if each were an update; more than 1 if the stage
    shares its teachers with a student of a smaller global batch (mvd.sharing). deepspeed: name of a file in
    ds_configs/. runs: the folder of all run directories. shards: number of jobs of `world_size` processes each that
    share a test; shard: the index of this one. rehearsal: null for a run that counts.
    """

    world_size: int = 1
    shards: int = 1
    shard: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    batch_parts: int = 1
    deepspeed: str = "zero1"
    precision: Precision = "bf16"
    runs: str = "runs"
    data: DatasetPaths | None = None
    rehearsal: Rehearsal | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of a plan: all that `mvd.run.run_stage` needs.

    inputs: role (image_teacher, video_teacher, pretrain, finetune) -> file with its weights.
    digests: role -> SHA-256 of an input that was given as a file, from when the stage's id was computed.
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
            raise ConfigError(
                f"stage {self.id}: the recipe of a {self.kind} must be a {expected.__name__}, got {given}"
            )

    @property
    def directory(self) -> Path:
        """The stage's run directory."""
        return Path(self.execution.runs) / self.id

    @property
    def files(self) -> RunDirectory:
        """The files of the run directory."""
        return RunDirectory(self.directory)

    @property
    def job_files(self) -> RunDirectory:
        """The files of one job of the stage: those of the run directory, or of a shard's folder in it."""
        how = self.execution
        return self.files.shard(how.shard, how.shards) if how.shards > 1 else self.files

    @property
    def job_directory(self) -> Path:
        """The folder of `job_files`."""
        return self.job_files.path

    def in_shards(self) -> list["Stage"]:
        """The stage as each of its jobs runs it."""
        executions = (dataclasses.replace(self.execution, shard=shard) for shard in range(self.execution.shards))
        return [dataclasses.replace(self, execution=execution) for execution in executions]

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Stage":
        """Reads stage.yaml; `path` may also be the run directory that holds it.

        Raises:
            ConfigError: there is no such file, or a field is unknown, missing or of the wrong type.
        """
        path = RunDirectory(Path(path)).stage if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise ConfigError(f"there is no file {path}; give the stage.yaml of a run directory, in the runs folder")
        try:
            raw = OmegaConf.merge({"digests": {}}, OmegaConf.load(path))  # older files have no digests
            odd = sorted(set(raw) ^ {f.name for f in dataclasses.fields(cls)})
            if odd:
                raise ValueError(f"{', '.join(odd)} is unknown or missing")
            cut_off = sorted(WRITTEN_BY_ALL - set(raw.execution))
            if cut_off:
                raise ValueError(f"execution lacks {', '.join(cut_off)}")
            recipe_type = RECIPES[raw.kind]
            recipe = OmegaConf.to_object(merge_typed(OmegaConf.structured(recipe_type), raw.recipe))
            execution: Any = OmegaConf.to_object(merge_typed(OmegaConf.structured(Execution), raw.execution))
            inputs: Any = OmegaConf.to_container(raw.inputs)
            digests: Any = OmegaConf.to_container(raw.digests)
            return cls(kind=raw.kind, id=raw.id, recipe=recipe, inputs=inputs, digests=digests, execution=execution)
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FAULTS:
                raise
            first_line = str(error).splitlines()[0]
            raise ConfigError(
                f"{path} is not a stage that this version can run: {first_line}; submit the row again"
            ) from error
