"""A row of a table: its stages and the accuracy that the paper reports for it."""

import re
from dataclasses import dataclass
from typing import Literal

from mvd.config.errors import check
from mvd.config.recipes import Finetune, ImageTeacher, Pretrain, Test, VideoTeacher


@dataclass(frozen=True, kw_only=True)
class Target:
    """The accuracy a row is to reach, in percent, and who says so."""

    top1: float
    top5: float | None = None
    source: str = "paper"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: its stages and the accuracy it is to reach.

    teachers: "checkpoint" takes the files that cluster.yaml names; "train" runs the two teacher stages first.
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
            f"a row is called {self.name!r}; its folders are named after it, so use letters, digits, _, . and -",
        )
        check(self.test is None or self.finetune is not None, f"row {self.name}: a test needs a finetune to test")
        if self.pretrain is not None:
            for role in ("image_teacher", "video_teacher"):
                teacher = getattr(self, role)
                check(
                    teacher is not None and teacher.size == self.pretrain.teacher,
                    f"row {self.name}: pretrain.teacher is {self.pretrain.teacher!r}; give an {role} of that size",
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
