"""Whether the data sets and teacher checkpoints of the profile are what they should be."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from launch.checks.finding import Finding, examine
from launch.cluster import Cluster
from launch.plan.graph import Node
from mvd.config import DATASETS, SIZES, ConfigError, DatasetPaths
from mvd.data.annotations import load_annotations
from mvd.weight_check import check_weights

FIRST_FILES = 3  # of each list, which must exist


def needed_inputs(nodes: Sequence[Node]) -> set[str]:
    """The names of the data sets and teachers of these stages."""
    teachers = {name for node in nodes for name in node.teacher_files.values()}
    return teachers | {node.recipe.dataset for node in nodes}


def check_inputs(cluster: Cluster, names: Collection[str] | None = None) -> Iterator[Finding]:
    """One finding per data set and teacher that the profile sets, or for those of these names."""
    for name, paths in cluster.datasets.items():
        known = DATASETS.get(name)
        if (names is None or name in names) and not (known is not None and known.generated):
            yield examine(f"datasets.{name}", partial(_check_dataset, name, paths))
    for name, path in cluster.teachers.items():
        if names is None or name in names:
            yield examine(f"teachers.{name}", partial(_check_teacher, name, Path(path)))


def _check_teacher(name: str, path: Path) -> str:
    """How many weights a teacher's file holds."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; correct the path, or delete the line and use teachers=train")
    kind, _, short_name = name.partition("_")
    size = next(size for size, record in SIZES.items() if record.short_name == short_name)
    found = check_weights(path, "image_teacher" if kind == "mae" else "video_teacher", size)
    return f"{path}: {len(found.sources)} weights of size {size}"


def _check_dataset(name: str, paths: DatasetPaths) -> str:
    """The lengths of its lists; for images, the number of class folders."""
    root = Path(paths.root)
    if not root.is_dir():
        raise ConfigError(
            f"there is no folder {root}; correct datasets.{name}.root, or delete the line if no row uses it"
        )
    known = DATASETS.get(name)
    if known is not None and known.media == "image":
        classes = sum(path.is_dir() for path in (root / "train").iterdir())
        if classes != known.classes:
            raise ConfigError(f"{root / 'train'} has {classes} class folders, expected {known.classes}")
        return f"{root}, {classes} class folders"
    lengths = []
    for split in ("train", "val", "test"):
        if not (root / getattr(paths, split)).is_file():
            continue
        entries = load_annotations(paths, split, known.classes if known is not None else 1_000_000)
        lengths.append(f"{len(entries):,} in {getattr(paths, split)}")
        for entry in entries[:FIRST_FILES]:
            if not Path(entry.path).is_file():
                raise ConfigError(f"{root / getattr(paths, split)}: there is no file {entry.path}; correct the list")
    if not lengths:
        raise ConfigError(f"{root} has none of {paths.train}, {paths.val} and {paths.test}; prepare the data set there")
    return f"{root}, {', '.join(lengths)}"
