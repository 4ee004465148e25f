"""A row of the paper's tables: its stages and its target accuracy."""

import re
from dataclasses import dataclass
from typing import Literal

from mvd.config.errors import check
from mvd.config.recipes import Finetune, ImageTeacher, Pretrain, Test, VideoTeacher


@dataclass(frozen=True, kw_only=True)
class Target:
    """The accuracy expected of a row, in percent, and where the number is from."""

    top1: float
    top5: float | None = None
    source: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its stages and its target accuracy.

    teachers: "checkpoint" uses the teacher files given in cluster.yaml; "train" runs the two teacher stages first.
    """

    name: str
    teachers: Literal["checkpoint", "train"] = "checkpoint"
    image_teacher: ImageTeacher | None = None
    video_teacher: VideoTeacher | None = None
    pretrain: Pretrain | None = None
    finetune: Finetune | None = None
    test: Test | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            f"row name {self.name!r} is used in folder names: start with a letter or digit, and use only letters, "
            "digits, _, . and -",
        )
        check(self.test is None or self.finetune is not None, f"row {self.name}: a test needs a finetune; add one")
        if self.pretrain is not None:
            for role in ("image_teacher", "video_teacher"):
                teacher = getattr(self, role)
                check(
                    teacher is not None and teacher.size == self.pretrain.teacher,
                    f"row {self.name}: pretrain.teacher is {self.pretrain.teacher!r}; add an {role} of that size",
                )
        if self.pretrain is not None and self.finetune is not None:
            check(
                self.pretrain.student == self.finetune.size,
                f"row {self.name}: pretrain.student is {self.pretrain.student!r} but finetune.size is "
                f"{self.finetune.size!r}; make them equal",
            )
        if self.finetune is not None and self.test is not None:
            for name in ("size", "dataset", "own_dataset", "sampling"):
                check(
                    getattr(self.finetune, name) == getattr(self.test, name),
                    f"row {self.name}: finetune.{name} and test.{name} differ; make them equal",
                )
