"""The task of each kind of training stage: its network, its frozen teachers and its losses."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models import beit
from torch import Tensor, nn

from mvd.config import SIZES, ConfigError, Finetune, ImageTeacher, Precision, Pretrain, VideoTeacher
from mvd.config.sizes import ClipShape
from mvd.data.clip.masking import masked_count
from mvd.models import (
    build_classifier,
    build_image_autoencoder,
    build_image_teacher,
    build_student,
    build_video_autoencoder,
    build_video_teacher,
)
from mvd.models.checkpoints import load_weights
from mvd.stage import Stage
from mvd.train.objectives import (
    Targets,
    distillation_targets,
    feature_loss,
    image_reconstruction_loss,
    video_reconstruction_loss,
)

Batch = dict[str, Tensor]


class Task(Protocol):
    """A network and its losses. watched: the modules whose outputs are drawn (mvd.evaluation.batch_pictures)."""

    watched: tuple[nn.Module, ...]

    @property
    def model(self) -> nn.Module: ...

    def losses(self, engine: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named scalars, of which "loss" is minimised. engine: the network as DeepSpeed wraps it."""
        ...


class ImageAutoencoding:
    """MAE on images."""

    watched: tuple[nn.Module, ...] = ()

    def __init__(self, recipe: ImageTeacher) -> None:
        self.model = build_image_autoencoder(recipe.size)
        self.masked = masked_count(SIZES[recipe.size].image_training.positions, recipe.mask_ratio)

    def losses(self, engine: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model = partial(engine, masked=self.masked)
        return {"loss": image_reconstruction_loss(model, batch["images"], batch["mask"])}


class VideoAutoencoding:
    """VideoMAE on clips."""

    watched: tuple[nn.Module, ...] = ()

    def __init__(self, recipe: VideoTeacher) -> None:
        self.model = build_video_autoencoder(recipe.size, activation_checkpointing=recipe.activation_checkpointing)
        clip = SIZES[recipe.size].clip
        self.tubelet, self.masked = clip.tubelet, masked_tokens(clip, recipe.mask_ratio)

    def losses(self, engine: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model = partial(engine, masked=self.masked)
        loss = video_reconstruction_loss(model, batch["video"], batch["mask"], tubelet=self.tubelet)
        return {"loss": loss}


class Teachers:
    """The two frozen teachers of a distillation, which several students can share.

    They are not part of an engine and so of no checkpoint. networks: of the image and of the video teacher.
    """

    def __init__(self, recipe: Pretrain, inputs: dict[str, str], precision: Precision, device: torch.device) -> None:
        self.recipe, self.inputs, self.precision = recipe, inputs, precision
        image_teacher, video_teacher = build_image_teacher(recipe.teacher), build_video_teacher(recipe.teacher)
        load_weights(image_teacher, inputs["image_teacher"])
        load_weights(video_teacher, inputs["video_teacher"])
        clip = SIZES[recipe.teacher].clip
        self.tubelet, self.masked = clip.tubelet, masked_tokens(clip, recipe.mask_ratio)
        self.networks = image_teacher.to(device), video_teacher.to(device)
        if precision == "bf16":
            for teacher in self.networks:
                store_in_bf16(teacher)
        self.image, self.video = (autocast(teacher, precision, device) for teacher in self.networks)

    def reload(self) -> bool:
        """Loads both networks again, in place; returns whether a weight had changed on this process."""
        loaded = Teachers(self.recipe, self.inputs, self.precision, torch.device("cpu"))
        had_changed = False
        for network, right in zip(self.networks, loaded.networks, strict=True):
            weights = right.state_dict()
            had_changed |= any(not value.cpu().equal(weights[name]) for name, value in network.state_dict().items())
            network.load_state_dict(weights)
        return had_changed

    def targets(self, batch: Batch) -> Batch:
        """Both teachers' features, as "image_targets" and "video_targets"; see distillation_targets."""
        video = batch["video"]
        image_video = batch.get("image_video", video)  # absent if both teachers take the same image size
        image, clip = distillation_targets(
            self.image, self.video, video, image_video, batch["mask"], self.masked, tubelet=self.tubelet
        )
        return {"image_targets": image, "video_targets": clip}


class Distillation:
    """A student and its two teachers. teachers: those of other students, to be shared; None to load its own."""

    def __init__(
        self,
        recipe: Pretrain,
        inputs: dict[str, str],
        precision: Precision,
        device: torch.device,
        teachers: Teachers | None = None,
    ) -> None:
        self.model = build_student(
            recipe.student,
            teacher=recipe.teacher,
            drop_path=recipe.drop_path,
            activation_checkpointing=recipe.activation_checkpointing,
        )
        self.teaching = teachers or Teachers(recipe, inputs, precision, device)
        self.teachers = self.teaching.networks
        self.watched: tuple[nn.Module, ...] = (self.model, *self.teachers)

    def losses(self, engine: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As `Task.losses`; the targets are taken from the batch if it has them (Teachers.targets).

        Otherwise the teachers come first, so that their activations are gone when the student's are kept.
        """
        if "image_targets" not in batch:
            batch = batch | self.teaching.targets(batch)
        predictions = engine(batch["video"], batch["mask"], masked=self.teaching.masked)
        total, image, clip = feature_loss(predictions, Targets(batch["image_targets"], batch["video_targets"]))
        return {"loss": total, "image_loss": image, "video_loss": clip}


class Classification:
    """A classifier on mixed clips with soft labels."""

    watched: tuple[nn.Module, ...] = ()

    def __init__(self, recipe: Finetune, classes: int, weights: str | None) -> None:
        self.model = build_classifier(
            recipe.size,
            num_classes=classes,
            drop_path=recipe.drop_path,
            head_dropout=recipe.head_dropout,
            activation_checkpointing=recipe.activation_checkpointing,
        )
        if weights is not None:
            load_weights(self.model, weights, drop_other_head=True)
        self.criterion: nn.Module = SoftTargetCrossEntropy()

    def losses(self, engine: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion(engine(batch["video"]).float(), batch["targets"])}


def masked_tokens(clip: ClipShape, ratio: float) -> int:
    """The masked tokens of a clip: its tubes over all slices. The networks need not count them on the device then."""
    return masked_count(clip.positions, ratio) * clip.slices


def store_in_bf16(network: nn.Module) -> None:
    """Converts the weights of a frozen network that autocast would convert in every forward pass, with equal results.

    Autocast keeps what it has converted only for weights that are trained. Norms and position tables stay in fp32.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.to(torch.bfloat16)
        elif isinstance(module, beit.Attention):  # joins the three parts of its bias in every forward pass
            parts: list[Any] = [module.q_bias, module.k_bias, module.v_bias]
            module.qkv.bias = nn.Parameter(torch.cat(parts).to(torch.bfloat16), requires_grad=False)
            for name in ("q_bias", "k_bias", "v_bias"):
                setattr(module, name, None)


def build_task(stage: Stage, classes: int, device: torch.device, teachers: Teachers | None = None) -> Task:
    """The task of a training stage, with weights initialised from torch's global random state.

    teachers: those that a pre-training shares with others; None to load its own.
    """
    recipe = stage.recipe
    if isinstance(recipe, ImageTeacher):
        return ImageAutoencoding(recipe)
    if isinstance(recipe, VideoTeacher):
        return VideoAutoencoding(recipe)
    if isinstance(recipe, Pretrain):
        return Distillation(recipe, stage.inputs, stage.execution.precision, device, teachers)
    if isinstance(recipe, Finetune):
        return Classification(recipe, classes, stage.inputs.get("pretrain"))
    raise ConfigError(f"stage {stage.id} must be of a kind that trains, got {stage.kind}")


def autocast(module: nn.Module, precision: Precision, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The module as a function that runs in the precision of the engine."""

    def call(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs: Tensor = module(inputs)
            return outputs

    return call
