"""The cluster profile: everything that belongs to a machine park and never to a recipe.

Read from --cluster FILE, else from the file that $MVD_CLUSTER names, else from cluster.yaml in the project root, else
the defaults below. cluster.example.yaml explains every field.
"""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from mvd.batch import working_world_sizes
from mvd.config import DATASETS, SIZES, ConfigError, DatasetPaths, Kind, Precision, Recipe, RunSettings, Test
from mvd.config.errors import check_positive
from mvd.config.typed import Override, apply_overrides, nearest

ROOT = Path(__file__).resolve().parents[1]
TEACHERS = tuple(f"{family}_{size.short_name}" for family in ("mae", "videomae") for size in SIZES.values())


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a stage of one kind gets: nodes, a file of ds_configs/, and a ceiling for the micro-batch.

    nodes: null for as many GPUs of the profile's `nodes` as the recipe's batch splits over; a number is kept to.
    micro_batch: samples (videos in fine-tuning, views in a test) of one GPU and forward pass; null for the recipe's.
    """

    nodes: int | None = None
    deepspeed: str = "zero1"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.nodes is not None and self.nodes < 1:
            raise ConfigError(f"nodes is {self.nodes}; a stage needs at least one")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"micro_batch is {self.micro_batch}; give a positive number of samples, or null")
        known = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
        if self.deepspeed not in known:
            raise ConfigError(f"deepspeed is {self.deepspeed!r}; use a file of ds_configs/: {', '.join(known)}")


# sbatch options that follow from the plan, so that nobody can set them by hand.
PLANNED_OPTIONS = {"array", "chdir", "dependency", "error", "kill_on_invalid_dep", "nodes", "ntasks", "ntasks_per_node"}
PLANNED_OPTIONS |= {"open_mode", "output", "requeue", "signal", "time"}


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """How jobs are submitted; what is null is left to the cluster's own defaults.

    memory_gb: of a node. array_parallelism: stages of one array that run at the same time; null for all.
    warning_seconds: how long before its limit a job is told to save and go on later. setup: shell lines before the
    job. environment: variables of the job. options: further sbatch options, which win over what is set here.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    cpus_per_gpu: int | None = None
    memory_gb: float | None = None
    time_limit_hours: float = 24.0
    warning_seconds: int = 300
    array_parallelism: int | None = None
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cpus_per_gpu", "memory_gb", "time_limit_hours", "warning_seconds", "array_parallelism"):
            value = getattr(self, name)
            if value is not None:
                check_positive(f"slurm.{name}", value)
        if self.time_limit_hours * 3600 <= self.warning_seconds:
            raise ConfigError(
                f"slurm.time_limit_hours is {self.time_limit_hours:g}, no more than slurm.warning_seconds="
                f"{self.warning_seconds}: a job would be told to save before it has begun; raise the limit"
            )
        for name in self.options:
            if name.replace("-", "_") in PLANNED_OPTIONS:
                raise ConfigError(f"slurm.options.{name} follows from the plan; use the profile's own fields instead")

    @property
    def excluded(self) -> str:
        """The nodes that no job is to use, in sbatch's words; empty for none."""
        return self.options.get("exclude", self.exclude) or ""


class Layout(NamedTuple):
    """The nodes of one job, and the GPUs, with one process each, on each of them."""

    nodes: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus}"


@dataclass(frozen=True, kw_only=True)
class Cluster(RunSettings):
    """Where stages run and where their files are; relative paths are under the project root."""

    runs: str = "runs"
    datasets: dict[str, DatasetPaths] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)
    nodes: int = 4
    gpus_per_node: int = 8
    image_teacher: Resources = Resources()
    video_teacher: Resources = Resources()
    pretrain: Resources = Resources()
    finetune: Resources = Resources()
    test: Resources = Resources(nodes=1, micro_batch=16)
    test_shards: int = 1
    slurm: Slurm = field(default_factory=Slurm)
    precision: Precision | None = None
    local_processes: int = 2
    sustained_tflops: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "gpus_per_node", "local_processes", "test_shards", "sustained_tflops"):
            check_positive(name, getattr(self, name))
        for name in self.teachers:
            if name not in TEACHERS:
                known = ", ".join(TEACHERS)
                raise ConfigError(f"teachers has no {name!r}{nearest(name, TEACHERS)}; use one of {known}")

    def resources(self, kind: Kind) -> Resources:
        return getattr(self, kind)

    def layout(self, kind: Kind, recipe: Recipe) -> Layout:
        """A job's nodes and GPUs: those of its kind, or the most of the profile's that its batch splits over."""
        nodes = self.resources(kind).nodes
        if isinstance(recipe, Test) and self.test_shards > 1:
            return Layout(1, 1)
        if nodes is not None or isinstance(recipe, Test):
            return Layout(nodes or self.nodes, self.gpus_per_node)
        most = self.nodes * self.gpus_per_node
        sizes = (n for n in reversed(working_world_sizes(recipe)) if n <= most)
        evenly = (
            Layout(nodes, size // nodes)
            for size in sizes
            for nodes in range(1, self.nodes + 1)
            if size % nodes == 0 and size // nodes <= self.gpus_per_node
        )
        return next(evenly)

    def gpus(self, kind: Kind, recipe: Recipe) -> int:
        """GPUs of one job, all its nodes together."""
        layout = self.layout(kind, recipe)
        return layout.nodes * layout.gpus


def load_cluster(file: str | None, overrides: Iterable[Override]) -> Cluster:
    """The profile with the command line's `cluster.*` settings on top, all paths absolute.

    Raises:
        ConfigError: a file that is missing or no YAML, an unknown key, a wrong type.
    """
    cluster = apply_overrides(Cluster(), [*_file_settings(file), *overrides])
    generated = {name: DatasetPaths(root=f"data/{name}") for name, record in DATASETS.items() if record.generated}
    datasets = generated | cluster.datasets
    return dataclasses.replace(
        cluster,
        runs=_absolute(cluster.runs),
        datasets={name: dataclasses.replace(paths, root=_absolute(paths.root)) for name, paths in datasets.items()},
        teachers={name: _absolute(path) for name, path in cluster.teachers.items()},
    )


def _file_settings(file: str | None) -> list[Override]:
    named = file or os.environ.get("MVD_CLUSTER")
    path = Path(named).expanduser() if named else ROOT / "cluster.yaml"
    if not path.is_file():
        if named:
            raise ConfigError(f"there is no cluster profile {path}; copy cluster.example.yaml there and edit it")
        return []
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # PyYAML's and OmegaConf's own
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}; mend that line") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no fields; write it as `field: value`, as cluster.example.yaml does")
    return [Override((f"{key!s}",), value, f"{path}: {key!s}") for key, value in content.items()]


def _absolute(path: str) -> str:
    return str(ROOT / Path(path).expanduser())
