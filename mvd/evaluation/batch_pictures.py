"""Pictures of the batches that a run trains on, after some of its epochs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mvd.config import SIZES
from mvd.data.class_names import class_names_of
from mvd.distributed.process import Process
from mvd.evaluation.pictures import Attempt, Distilled, Picture, distillation_picture, mixed_picture
from mvd.monitoring.metrics import Metrics
from mvd.stage import Stage

PICTURES = 20  # of a run, at about equal intervals
MIXED_CLIPS = 4  # of a fine-tuning batch


class BatchPictures:
    """Draws one clip of a pre-training, or a few of a fine-tuning; other stages have no pictures.

    The first process draws, from values that the update computes anyway: nothing of the training changes. A picture
    is made of the last update of the first epoch, of every twentieth part of the run, and of the last update.

    watched: of a pre-training, the student and its image and video teacher.
    """

    def __init__(
        self, stage: Stage, process: Process, watched: Sequence[nn.Module], steps_per_epoch: int, total_updates: int
    ) -> None:
        self.stage, self.watched = stage, watched
        self.is_drawn = process.is_first and stage.kind in ("pretrain", "finetune")
        self.first, self.last = steps_per_epoch, total_updates
        self.every = steps_per_epoch * max(1, total_updates // steps_per_epoch // PICTURES)
        self.attempt = Attempt("pictures of training clips")
        self.kept: Any = None

    def due(self, update: int) -> bool:
        """Whether this process draws a picture of this update."""
        return self.is_drawn and (update % self.every == 0 or update in (self.first, self.last))

    @contextmanager
    def watching(self, update: int, batch: dict[str, Tensor]) -> Iterator[None]:
        """Keeps what the picture of an update needs of a micro-batch and of its forward passes in the block."""
        if not self.due(update) or self.kept is not None:  # the first micro-batch is enough
            yield
            return
        outputs: dict[int, Any] = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, place=place: outputs.update({place: output}))
            for place, module in enumerate(self.watched)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.kept = self.attempt(lambda: self._keep(batch, outputs))

    @torch.no_grad()
    def _keep(self, batch: dict[str, Tensor], outputs: dict[int, Any]) -> Any:
        """Copies on the device: nothing is waited for, and the batch can be freed."""
        if self.stage.kind == "finetune":
            return batch["video"][:MIXED_CLIPS].clone(), batch["targets"][:MIXED_CLIPS].clone()
        (image, video), by_frame, by_clip = (outputs[place] for place in range(3))
        slices = len(by_frame) // len(by_clip)
        targets = by_frame[:slices].flatten(0, 1).clone(), by_clip[0].clone()
        predictions = image[0].detach().clone(), video[0].detach().clone()
        return Distilled(batch["video"][0].clone(), batch["mask"][0].clone(), predictions, targets)

    def draw(self, update: int, metrics: Metrics) -> None:
        """Writes the picture of the update, if there is one."""
        kept, self.kept = self.kept, None
        picture = None if kept is None else self.attempt(lambda: self._picture(kept))
        if picture is not None:
            name = "targets and predictions" if self.stage.kind == "pretrain" else "augmented and mixed clips"
            metrics.image(update, f"pictures/{name}", picture)

    def _picture(self, kept: Any) -> Picture:
        recipe = self.stage.recipe
        if self.stage.kind == "pretrain":
            return distillation_picture(kept, SIZES[recipe.student].clip)
        video, targets = kept
        return mixed_picture(video, targets, class_names_of(recipe, self.stage.execution.data))
