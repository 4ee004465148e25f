"""Which pre-trainings can share one pass of their teachers, and how their updates are aligned. Must not import torch.

Students whose teachers, data, seed, stride and mask are the same see identical clips with identical masks, and their
layers draw from identical seeds. The unit of sharing is the smallest global batch of the group: a student with k times
that batch makes one update of k consecutive units. An epoch has as many units as the smallest batch has updates; the
units at its end that do not fill a student's update are not its own, and the next epoch starts aligned again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from mvd.config import Pretrain, dataset_of
from mvd.identity import identity

OWN_SETTINGS = {"student", "drop_path", "optimization", "activation_checkpointing", "weights"}  # of each student


class Student(NamedTuple):
    """A pre-training that may share its teachers: its stage id, recipe and teachers (role -> id or file)."""

    name: str
    recipe: Pretrain
    teachers: Mapping[str, str]


def why_not(first: Student, second: Student) -> str:
    """Why two students cannot share one pass of their teachers, as a clause; empty if they can."""
    for field in fields(Pretrain):
        one, other = getattr(first.recipe, field.name), getattr(second.recipe, field.name)
        if field.name not in OWN_SETTINGS and identity(one) != identity(other):
            return f"pretrain.{field.name} differs ({_shown(one)} and {_shown(other)})"
    if first.teachers != second.teachers:
        role = next(r for r in first.teachers if first.teachers[r] != second.teachers.get(r))
        return f"the {role.replace('_', ' ')} differs ({first.teachers[role]} and {second.teachers.get(role)})"
    small, large = sorted(student.recipe.optimization.global_batch for student in (first, second))
    if large % small:
        return f"the larger global batch must be a multiple of the smaller one ({small} and {large})"
    return ""


def sharing_groups(students: Sequence[Student]) -> list[list[Student]]:
    """The largest groups that can share, of two students or more; students and groups keep their order."""
    groups: list[list[Student]] = []
    for student in sorted(students, key=lambda student: student.recipe.optimization.global_batch):
        # With all members, since one with the smallest batch may be complete before the others.
        fitting = (group for group in groups if not any(why_not(member, student) for member in group))
        group = next(fitting, None)
        if group is None:
            groups.append([student])
        else:
            group.append(student)
    place = {student.name: number for number, student in enumerate(students)}
    ordered = [sorted(group, key=lambda student: place[student.name]) for group in groups if len(group) > 1]
    return sorted(ordered, key=lambda group: place[group[0].name])


def smallest_batch(recipes: Sequence[Pretrain]) -> int:
    """Samples of a unit: the smallest global batch of a group."""
    return min(recipe.optimization.global_batch for recipe in recipes)


@dataclass(frozen=True)
class Alignment:
    """The units of one student's updates. samples: of the training list. unit: samples of a unit."""

    samples: int
    unit: int
    global_batch: int

    @property
    def units(self) -> int:
        """Units of an update."""
        return self.global_batch // self.unit

    def first_unit(self, update: int) -> int:
        """The unit with which an update (counted from 0) begins, counted from 0 over all epochs."""
        epoch, step = divmod(update, self.samples // self.global_batch)
        return epoch * (self.samples // self.unit) + step * self.units


def teacher_samples(recipes: Sequence[Pretrain]) -> int:
    """Clips that the teachers of a group see: in each epoch those of the student that uses most of them."""
    samples = dataset_of(recipes[0]).train_samples
    in_epoch = [(recipe.optimization.epochs, _used(samples, recipe)) for recipe in recipes]
    last = max(epochs for epochs, _ in in_epoch)
    return sum(max(used for epochs, used in in_epoch if epochs > epoch) for epoch in range(last))


def _used(samples: int, recipe: Pretrain) -> int:
    batch = recipe.optimization.global_batch
    return samples // batch * batch


def _shown(value: object) -> str:
    return "null" if value is None else f"{value}"
