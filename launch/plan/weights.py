"""Checks the files that stages start from, before anything is queued; needs no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.cluster import Cluster
from launch.plan.graph import Node
from mvd.config import ConfigError, Finetune, Pretrain, Test, dataset_of
from mvd.weight_check import Role, check_values, check_weights
from mvd.weight_keys import Fit


class Given(NamedTuple):
    """A file with weights, and what it is for. setting: where it was set, for messages."""

    setting: str
    path: Path
    role: Role
    size: str
    classes: int = 0

    def check(self) -> Fit:
        """Raises ConfigError if keys, shapes or number of classes do not fit."""
        try:
            return check_weights(self.path, self.role, self.size, self.classes)
        except ConfigError as error:
            raise ConfigError(f"{self.setting}: {error}") from error


def check_given_weights(nodes: Sequence[Node], cluster: Cluster) -> None:
    """Checks all teachers and given weights of these stages, each file once: first what is quick, then their values.

    Raises:
        ConfigError: a file cannot be used; names its setting.
    """
    files = dict.fromkeys([*_teachers(nodes, cluster), *_weights(nodes)])
    found = {given: given.check() for given in files}
    for given, fit in found.items():
        try:
            check_values(given.path, fit)
        except ConfigError as error:
            raise ConfigError(f"{given.setting}: {error}") from error


def notes_on_weights(nodes: Sequence[Node]) -> list[str]:
    """What is done to given weights so that they fit, such as dropping the head of a classifier of other classes."""
    files = dict.fromkeys(_weights(nodes))
    return [f"{given.setting}: {note}" for given in files for note in given.check().notes]


def _teachers(nodes: Sequence[Node], cluster: Cluster) -> Iterator[Given]:
    for node in nodes:
        for role, name in node.teacher_files.items():
            if isinstance(node.recipe, Pretrain) and Path(cluster.teachers.get(name, "")).is_file():
                kind: Role = "image_teacher" if role == "image_teacher" else "video_teacher"
                yield Given(f"teachers.{name}", Path(cluster.teachers[name]), kind, node.recipe.teacher)


def _weights(nodes: Sequence[Node]) -> Iterator[Given]:
    for node in nodes:
        for role, path in node.files.items():
            if isinstance(node.recipe, Finetune | Test):
                kind: Role = "finetune" if role == "finetune" else "pretrain"
                yield Given(f"{role}.weights", Path(path), kind, node.recipe.size, dataset_of(node.recipe).classes)
