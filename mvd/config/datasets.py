"""The data sets, one record each. A new public data set is one record here."""

from dataclasses import dataclass, field
from typing import Literal

from mvd.config.errors import check
from mvd.config.fields import NOT_HASHED

Media = Literal["video", "image"]
Sampling = Literal["dense", "segment"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set. A row file declares one for its own data and passes it to its recipes as `own_dataset`.

    media: kind of files. classes: number of classes. train_samples, val_samples: lengths of the lists (for k400
    and ssv2, the number of samples that the paper used).

    The remaining fields are defaults for the rows of `experiments/` and for the launcher; a recipe has its own values.
    sampling: how the frames of a clip are chosen in fine-tuning and testing. test_clips: clips per test video.
    mirrored_is_same_class: False if labels depend on left and right. generated: created by mvd.data.synthetic_motion
    when it is first needed.
    """

    media: Media = "video"
    classes: int
    train_samples: int
    val_samples: int = 0
    sampling: Sampling = field(default="dense", metadata=NOT_HASHED)
    test_clips: int = field(default=5, metadata=NOT_HASHED)
    mirrored_is_same_class: bool = field(default=True, metadata=NOT_HASHED)
    generated: bool = field(default=False, metadata=NOT_HASHED)

    def __post_init__(self) -> None:
        check(self.classes > 1, f"classes must be at least 2, got {self.classes}")
        check(
            self.train_samples > 0, f"train_samples must be the length of the training list, got {self.train_samples}"
        )
        check(self.val_samples >= 0, f"val_samples must be the length of the validation list, got {self.val_samples}")
        check(self.test_clips > 0, f"test_clips must be at least 1, got {self.test_clips}")

    def supplies(self, media: Media) -> bool:
        """Whether a stage of this media can use the data set; an image stage can use frames of generated videos."""
        return self.media == media or (media == "image" and self.generated)


DATASETS: dict[str, Dataset] = {
    "k400": Dataset(classes=400, train_samples=240_436, val_samples=19_796),
    "ssv2": Dataset(
        classes=174,
        train_samples=168_913,
        val_samples=24_777,
        sampling="segment",
        test_clips=2,
        mirrored_is_same_class=False,  # "from left to right" is another class than its mirror image
    ),
    "imagenet": Dataset(media="image", classes=1000, train_samples=1_281_167, val_samples=50_000),
    "motion": Dataset(classes=8, train_samples=2400, val_samples=320, generated=True),
    # Three official splits each. They are data sets of their own, since paths are not part of a stage's id.
    "ucf101": Dataset(classes=101, train_samples=9537, val_samples=3783),
    "ucf101_split2": Dataset(classes=101, train_samples=9586, val_samples=3734),
    "ucf101_split3": Dataset(classes=101, train_samples=9624, val_samples=3696),
    "hmdb51": Dataset(classes=51, train_samples=3570, val_samples=1530),
    "hmdb51_split2": Dataset(classes=51, train_samples=3570, val_samples=1530),
    "hmdb51_split3": Dataset(classes=51, train_samples=3570, val_samples=1530),
}
