"""The runs that a storm disturbs: a fine-tuning, or several pre-trainings that share their teachers."""

from collections.abc import Callable
from pathlib import Path

from mvd.config.run_settings import DatasetPaths, Faults
from mvd.data.synthetic_motion import generate_motion
from mvd.stage import Stage
from tests.conftest import write_teachers
from tests.runs import small_stage

# Stage -> the updates whose loss is not a number on the second process, in every attempt that comes to them.
NAN = {"finetune": (9,), "small": (7, 8, 9), "large": (4,)}
GOES_BACK = "small"  # so many in a row make it return to its newest checkpoint
FAULTS = Faults(unreadable_share=0.1, save_failures=12, save_again_seconds=1)

Students = Callable[[Path], list[Stage]]  # the stages of one job, in a folder of run directories


class Data:
    """Short generated videos, the first and the last of which are broken. videos: those that are not."""

    def __init__(self, folder: Path, count: int) -> None:
        self.root = generate_motion(folder / "motion", train=48, val=16)
        lines = (self.root / "train.csv").read_text().splitlines()[:count]
        for place in (0, -1):
            (folder / f"broken{place}.mp4").write_bytes(b"no video")
            lines[place] = f"{folder}/broken{place}.mp4 0"
        (folder / "train.csv").write_text("\n".join(lines) + "\n")
        self.videos = [self.root / line.rpartition(" ")[0] for line in lines[1:-1]]
        self.paths = DatasetPaths(root=str(self.root), train=str(folder / "train.csv"))


def finetuning(folder: Path) -> tuple[Data, Students]:
    """A run of 24 updates with drop path, dropout and mixing."""
    data = Data(folder, 48)

    def stages(runs: Path) -> list[Stage]:
        how = {"epochs": 4, "schedule_epochs": 4, "drop_path": 0.3, "head_dropout": 0.3, "checkpoint_every": 3}
        return [small_stage("finetune", "finetune", runs, data.paths, workers=1, log_every=2, faults=FAULTS, **how)]

    return data, stages


def group(folder: Path, count: int) -> tuple[Data, Students]:
    """Two or three students with drop path, one of them with half the batch of the others.

    An epoch has five updates of 8 videos, or two of 16 and a unit that belongs to no update of theirs. The third is
    complete an epoch before the others.
    """
    data = Data(folder, 44)
    folder.joinpath("teachers").mkdir()
    teachers = write_teachers(folder / "teachers")
    double = {"global_batch": 16, "accumulation": 4, "batch_parts": 2}
    differing = {
        "small": {"epochs": 5, "schedule_epochs": 5, "checkpoint_every": 3},
        "large": {"epochs": 5, "schedule_epochs": 5, "checkpoint_every": 2, **double},
        "third": {"epochs": 4, "schedule_epochs": 4, "checkpoint_every": 2, "base_lr": 0.008, **double},
    }
    chosen = list(differing.items())[:count]

    def stages(runs: Path) -> list[Stage]:
        shared = {"drop_path": 0.1, "workers": 1, "log_every": 2, "faults": FAULTS}
        return [small_stage("pretrain", name, runs, data.paths, teachers, **shared, **how) for name, how in chosen]

    return data, stages
