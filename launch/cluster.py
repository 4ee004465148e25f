"""The cluster profile: everything that depends on the machines and never on a recipe.

Read from --cluster FILE, else from the file in $MVD_CLUSTER, else from cluster.yaml in the project root; without a file
the defaults below apply. cluster.example.yaml explains every field.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from mvd.batch import working_world_sizes
from mvd.config import DATASETS, SIZES, ConfigError, DatasetPaths, Kind, Precision, Recipe, RunSettings, Test
from mvd.config.errors import check, check_positive
from mvd.config.typed import Override, apply_overrides, nearest

CODE = Path(__file__).resolve().parents[1]  # holds mvd, launch, experiments and ds_configs
# The project root: relative paths of the profile start here. A wheel has none, so the current folder takes its place.
ROOT = CODE if (CODE / "pyproject.toml").is_file() else Path.cwd()
EXAMPLE = Path(__file__).with_name("cluster.example.yaml").resolve()
TEACHERS = tuple(f"{family}_{size.short_name}" for family in ("mae", "videomae") for size in SIZES.values())


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of every stage of one kind.

    nodes: null for the largest number of the profile's GPUs that divides the global batch; a number is used as given.
    deepspeed: a file of ds_configs/, without .json; null for zero0 or, for large networks, zero1. micro_batch: upper
    limit of the samples (videos in fine-tuning, views in a test) per GPU and forward pass; null for the recipe's, or
    with gpu_memory_gb for the most that fit.
    """

    nodes: int | None = None
    deepspeed: str | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.nodes is not None and self.nodes < 1:
            raise ConfigError(f"nodes must be at least 1, or null, got {self.nodes}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"micro_batch must be at least 1, or null, got {self.micro_batch}")
        known = sorted(path.stem for path in (CODE / "ds_configs").glob("*.json"))
        if self.deepspeed not in (None, *known):
            files = ", ".join(known)
            raise ConfigError(f"deepspeed must be a file of ds_configs/ ({files}), or null, got {self.deepspeed!r}")


# sbatch options that the launcher sets itself; the profile must not.
PLANNED_OPTIONS = {"array", "chdir", "dependency", "error", "kill_on_invalid_dep", "nodes", "ntasks", "ntasks_per_node"}
PLANNED_OPTIONS |= {"no_kill", "open_mode", "output", "requeue", "signal", "time"}


@dataclass(frozen=True, kw_only=True)
class PretrainResources(Resources):
    """share_teachers: whether pre-trainings that can run in one job and share one pass of their teachers."""

    share_teachers: bool = True


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """How jobs are submitted; null leaves a field to the cluster's own default.

    memory_gb: per node. array_parallelism: stages of one array that run at the same time; null for all.
    warning_seconds: how long before the time limit a job is told to save and requeue. spare_nodes: by how many a job of
    a training stage asks for more nodes than it uses, to replace lost and blamed ones. shrink: whether such a job goes
    on with fewer GPUs if a node is lost or blamed and no spare one is left. setup: shell lines at the start of the job.
    environment: variables of the job. options: further sbatch options, which override the fields here.
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
    spare_nodes: int = 0
    shrink: bool = False
    array_parallelism: int | None = None
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cpus_per_gpu", "memory_gb", "time_limit_hours", "warning_seconds", "array_parallelism"):
            value = getattr(self, name)
            if value is not None:
                check_positive(f"slurm.{name}", value)
                check(math.isfinite(value), f"slurm.{name} must be a finite number, got {value}")
        check(self.spare_nodes >= 0, f"slurm.spare_nodes must be at least 0, got {self.spare_nodes}")
        if self.time_limit_hours * 3600 <= self.warning_seconds:
            raise ConfigError(
                f"slurm.time_limit_hours must be longer than slurm.warning_seconds={self.warning_seconds}, "
                f"got {self.time_limit_hours:g} h; raise the limit"
            )
        for name, value in self.options.items():
            check(
                value is None or isinstance(value, str | int | float),
                f"slurm.options.{name} must be a string, a number, true, false or null, got {value!r}",
            )
            if name.replace("-", "_") in PLANNED_OPTIONS:
                raise ConfigError(f"slurm.options.{name} is set by the launcher; use the profile's own fields instead")

    @property
    def excluded(self) -> str:
        """Nodes that no job may use, as a value of sbatch --exclude; empty for none."""
        return str(self.options.get("exclude", self.exclude) or "")


class Layout(NamedTuple):
    """Nodes of a job, and GPUs per node; each GPU gets one process."""

    nodes: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus}"


def largest_layout(sizes: Iterable[int], nodes: int, gpus: int) -> Layout | None:
    """The largest of these numbers of GPUs that up to so many nodes and GPUs per node give, on the fewest nodes."""
    evenly = (
        Layout(count, size // count)
        for size in sorted(sizes, reverse=True)
        for count in range(1, nodes + 1)
        if size % count == 0 and size // count <= gpus
    )
    return next(evenly, None)


@dataclass(frozen=True, kw_only=True)
class Cluster(RunSettings):
    """Where stages run and where their files are; relative paths start at the project root."""

    runs: str = "runs"
    datasets: dict[str, DatasetPaths] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)
    nodes: int = 4
    gpus_per_node: int = 8
    gpu_memory_gb: float | None = None
    image_teacher: Resources = Resources()
    video_teacher: Resources = Resources()
    pretrain: PretrainResources = PretrainResources()
    finetune: Resources = Resources()
    test: Resources = Resources(nodes=1, micro_batch=16)
    test_shards: int = 1
    slurm: Slurm = field(default_factory=Slurm)
    precision: Precision | None = None
    local_processes: int = 2
    sustained_tflops: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.runs != "", "runs must be a folder, got an empty string")
        for name in ("nodes", "gpus_per_node", "local_processes", "test_shards", "sustained_tflops"):
            check_positive(name, getattr(self, name))
        if self.gpu_memory_gb is not None:
            check_positive("gpu_memory_gb", self.gpu_memory_gb)
        for name in self.teachers:
            if name not in TEACHERS:
                known = ", ".join(TEACHERS)
                raise ConfigError(f"teachers has no key {name!r}{nearest(name, TEACHERS)}; use one of {known}")

    def resources(self, kind: Kind) -> Resources:
        """The settings of one kind of stage."""
        found: Resources = getattr(self, kind)
        return found

    def layout(self, kind: Kind, recipe: Recipe) -> Layout:
        """Nodes and GPUs of a job: as its kind sets them, else the most that divide its global batch."""
        nodes = self.resources(kind).nodes
        if isinstance(recipe, Test) and self.test_shards > 1:
            return Layout(1, 1)
        if nodes is not None or isinstance(recipe, Test):
            return Layout(nodes or self.nodes, self.gpus_per_node)
        return largest_layout(working_world_sizes(recipe), self.nodes, self.gpus_per_node) or Layout(1, 1)

    def gpus(self, kind: Kind, recipe: Recipe) -> int:
        """GPUs of one job, over all its nodes."""
        layout = self.layout(kind, recipe)
        return layout.nodes * layout.gpus


def load_cluster(file: str | None, overrides: Iterable[Override]) -> Cluster:
    """The profile with the command line's `cluster.*` settings applied; all paths are absolute.

    Raises:
        ConfigError: the file is missing or no YAML; an unknown key, a value of the wrong type or an invalid one.
    """
    cluster = apply_overrides(Cluster(), [*_file_settings(file), *overrides])
    generated = {name: DatasetPaths(root=f"data/{name}") for name, record in DATASETS.items() if record.generated}
    datasets = generated | cluster.datasets
    runs = _absolute(cluster.runs)
    check_log_folder("runs", runs)
    return dataclasses.replace(
        cluster,
        runs=runs,
        datasets={name: dataclasses.replace(paths, root=_absolute(paths.root)) for name, paths in datasets.items()},
        teachers={name: _absolute(path) for name, path in cluster.teachers.items()},
    )


def check_log_folder(name: str, folder: str | Path) -> None:
    """Refuses a folder for job logs in whose path sbatch would expand a pattern such as %j.

    Raises:
        ConfigError: there is a % or a backslash in the path.
    """
    for character in ("%", "\\"):
        if character in str(folder):
            raise ConfigError(
                f"{name}: the path must not contain {character}, which SLURM treats specially in the paths of logs "
                f"(as in %j), got {folder}; use another folder"
            )


def _file_settings(file: str | None) -> list[Override]:
    given = file or os.environ.get("MVD_CLUSTER")
    path = Path(given).expanduser() if given else ROOT / "cluster.yaml"
    if not path.is_file():
        if given:
            raise ConfigError(f"there is no cluster profile {path}; copy {EXAMPLE} to it and edit it")
        return []
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # PyYAML's and OmegaConf's own errors
        reason = " ".join(str(error).partition("object_type=")[0].split())  # the rest is OmegaConf's own type
        raise ConfigError(f"{path} cannot be read: {reason}; fix that line") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no fields; write `field: value` lines, as in {EXAMPLE}")
    return [Override((f"{key!s}",), value, f"{path}: {key!s}") for key, value in content.items()]


def _absolute(path: str) -> str:
    return str(ROOT / Path(path).expanduser())
