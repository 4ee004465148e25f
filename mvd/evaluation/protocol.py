"""How a classifier is applied to a video: its size, its views and the names of its classes.

Stored with the weights, so that they can be used without the run that made them: as JSON under `protocol` in the
metadata of a .safetensors file, in an exported .pth file, and in the config.json of an exported timm folder.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mvd.config import SIZES, ConfigError, Finetune, Pretrain, Sampling, Test, VideoTeacher, dataset_of
from mvd.config.sizes import ClipShape
from mvd.data.class_names import class_names_of
from mvd.data.views import Views
from mvd.evaluation.views_of_file import test_views
from mvd.stage import Stage

KEY = "protocol"
CROPS = 3  # of each clip, in all tests of the paper


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The views of a video, as in mvd.config.Test, and the classes.

    size: of the encoder (mvd.config.sizes). classes: their number; 0 for an encoder without a head. names: index =
    class number; None if they are unknown.
    """

    size: str
    sampling: Sampling = "dense"
    stride: int = 4
    clips: int = 5
    crops: int = CROPS
    classes: int = 0
    names: tuple[str, ...] | None = None

    @property
    def clip(self) -> ClipShape:
        """The network's input."""
        return SIZES[self.size].clip

    @property
    def views(self) -> Views:
        return Views(self.sampling, self.clips, self.crops, self.stride, self.clip)

    def cut(self, path: str | Path) -> Tensor:
        """The views of a video, clip by clip and crop by crop: float32 (clips x crops, 3, T, S, S), normalised.

        Raises:
            UnreadableVideo: the file cannot be decoded.
        """
        return test_views(path, **self.views._asdict())

    def name(self, number: int) -> str:
        """The name of a class, or `class <number>`."""
        return f"class {number}" if self.names is None else self.names[number]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; also the frames and the image size of a clip, in pixels, for other programs."""
        values = dataclasses.asdict(self)
        values["names"] = None if self.names is None else list(self.names)
        return {**values, "frames": self.clip.frames, "image_size": self.clip.image_size}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str) -> "Protocol":
        """The protocol that `as_dict` described.

        Raises:
            ConfigError: a value is missing or of the wrong type, or this version does not have the size.
        """
        try:
            names = values["names"]
            made = cls(
                size=str(values["size"]),
                sampling=values["sampling"],
                **{key: int(values[key]) for key in ("stride", "clips", "crops", "classes")},
                names=None if names is None else tuple(str(name) for name in names),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{origin}: its description ({KEY}) is damaged ({type(error).__name__}: {error}); export it again"
            ) from error
        if made.size not in SIZES:
            raise ConfigError(f"{origin} is of the size {made.size!r}, which this version does not have")
        if made.sampling not in ("dense", "segment") or (made.names is not None and len(made.names) != made.classes):
            raise ConfigError(f"{origin}: its description ({KEY}) contradicts itself; export the weights again")
        return made


def protocol_of(stage: Stage) -> Protocol:
    """The protocol for the network of a stage: a test's own views, or those of the data set's tests.

    Raises:
        ConfigError: the stage has no video encoder.
    """
    recipe, record = stage.recipe, dataset_of(stage.recipe)
    if isinstance(recipe, Pretrain | VideoTeacher):
        return Protocol(size=recipe.student if isinstance(recipe, Pretrain) else recipe.size, stride=recipe.stride)
    if not isinstance(recipe, Finetune | Test):
        raise ConfigError(f"{stage.id} trains an encoder of images; use the run of a fine-tuning or a pre-training")
    clips, crops = (recipe.clips, recipe.crops) if isinstance(recipe, Test) else (record.test_clips, CROPS)
    names = stage.files.class_names() or class_names_of(recipe, stage.execution.data)
    return Protocol(
        size=recipe.size,
        sampling=recipe.sampling,
        stride=recipe.stride,
        clips=clips,
        crops=crops,
        classes=record.classes,
        names=None if names is None else tuple(names),
    )


def describe(stage: Stage) -> dict[str, str]:
    """The entry of a weights file's metadata; nothing for networks without classes."""
    return {KEY: json.dumps(protocol_of(stage).as_dict())} if isinstance(stage.recipe, Finetune) else {}
