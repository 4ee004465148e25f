"""Pictures of a training: what the networks see, what a student predicts, and which videos are classified wrongly."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd.config.sizes import ClipShape
from mvd.data.inspect import FRAMES, HIDDEN, Strip, denormalised, sheet, token_pixels
from mvd.models.tokens import visible_then_masked

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
T = TypeVar("T")

SMALLEST = 96  # side in pixels to which smaller frames are enlarged
LISTED = 3  # classes named per clip
NO_PREDICTION = 160  # grey level of tokens that the student sees, and so does not predict


class Attempt:
    """Runs code whose failure must not end a training: the first failure is a warning in the log, the rest is silent.

    what: for the warning, such as "pictures of mistakes".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.has_failed = False

    def __call__(self, make: Callable[[], T]) -> T | None:
        """The result of `make`, or None if it raised an exception."""
        try:
            return make()
        except Exception as error:  # a picture is worth no run, whatever went wrong
            if not self.has_failed:
                reason = f"{type(error).__name__}: {error}"
                logger.warning("no %s, training continues without them: %s", self.what, reason)
            self.has_failed = True
            return None


class Distilled(NamedTuple):
    """One clip of a pre-training update.

    video: (3, T, S, S), normalised. mask: (N,) bool, True = masked. predictions: the student's image and video features
    of the masked tokens, in token order, each (M, D). targets: the image and the video teacher's features of all
    tokens, each (N, D).
    """

    video: Tensor
    mask: Tensor
    predictions: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]


def distillation_picture(seen: Distilled, clip: ClipShape) -> Picture:
    """A masked clip, and below it the teachers' features and the student's predictions as colours."""
    mask = seen.mask.cpu()
    frames = denormalised(seen.video.cpu())[:: clip.tubelet]
    hidden = token_pixels(mask, clip)[:: clip.tubelet, ..., None]
    masked = np.where(hidden, np.uint8(HIDDEN), frames)
    share = 100 * float(mask.float().mean())
    strips = [Strip("the clip", frames), Strip(f"what the student sees: {share:.0f} % is masked", masked)]
    order = visible_then_masked(mask[None])[0, -int(mask.sum()) :]
    for name, predicted, target in zip(("image", "video"), seen.predictions, seen.targets, strict=True):
        colours = principal_colours(target.float().cpu(), predicted.float().cpu())
        guessed = torch.full((clip.tokens, 3), NO_PREDICTION, dtype=torch.uint8)
        guessed[order] = colours[1]
        strips.append(
            Strip(f"{name} teacher: the three main components of its features as colours", _grid(colours[0], clip))
        )
        strips.append(
            Strip(f"the student's prediction for the {name} teacher, at the masked tokens", _grid(guessed, clip))
        )
    return _sheet(strips)


def principal_colours(targets: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) -> uint8 RGB (N, 3) and (M, 3): the targets' first three principal components.

    The range from the 2nd to the 98th percentile of the targets is 0 to 255, for both.
    """
    centre = targets.mean(dim=0)
    shifted = targets - centre
    _, vectors = torch.linalg.eigh(shifted.T @ shifted)
    basis = vectors[:, -3:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    basis = basis * largest.sign()  # eigenvectors have no sign of their own
    low, high = torch.quantile(shifted @ basis, torch.tensor([0.02, 0.98]), dim=0)

    def colours(features: Tensor) -> Tensor:
        levels = ((features - centre) @ basis - low) / (high - low).clamp(min=1e-12)
        rounded: Tensor = (255 * levels).round().clamp(0, 255).byte()
        return rounded

    return colours(targets), colours(others)


def mixed_picture(video: Tensor, targets: Tensor, names: Sequence[str] | None) -> Picture:
    """Augmented, erased and mixed clips (n, 3, T, S, S), normalised, with their targets (n, classes) as titles."""
    return _sheet(
        Strip("target: " + label_weights(target, names), denormalised(clip))
        for clip, target in zip(video.cpu(), targets.cpu(), strict=True)
    )


def label_weights(target: Tensor, names: Sequence[str] | None) -> str:
    """The classes of a soft target (classes,) above label smoothing's floor, such as `62 % left + 33 % up`."""
    floor = float(target.min())
    weights, numbers = target.topk(min(LISTED, len(target)))
    pairs = zip(weights.tolist(), numbers.tolist(), strict=True)
    return " + ".join(f"{weight:.0%} {class_name(number, names)}" for weight, number in pairs if weight > floor + 1e-6)


class Mistake(NamedTuple):
    """A video, uint8 (3, T, S, S), that is of class `label` and was classified as `predicted`, with a probability."""

    video: Tensor
    file: str
    label: int
    predicted: int
    probability: float


def mistakes_picture(mistakes: Sequence[Mistake], names: Sequence[str] | None) -> Picture:
    """Wrongly classified videos, one strip each."""
    return _sheet(
        Strip(
            f"{class_name(found.label, names)}, predicted: {class_name(found.predicted, names)} "
            f"({found.probability:.0%}); {found.file}",
            found.video.permute(1, 2, 3, 0).numpy(),
        )
        for found in mistakes
    )


def class_name(number: int, names: Sequence[str] | None) -> str:
    """The name of a class, or `class <number>`."""
    return f"class {number}" if names is None else names[number]


def _grid(colours: Tensor, clip: ClipShape) -> NDArray[np.uint8]:
    """uint8 (tokens, 3) -> (slices, S, S, 3)."""
    frames = colours.view(clip.slices, clip.side, clip.side, 3).numpy()
    return frames.repeat(clip.patch_size, axis=1).repeat(clip.patch_size, axis=2)


def _sheet(strips: Iterable[Strip]) -> Picture:
    shown = []
    for title, frames in strips:
        times = -(-SMALLEST // frames.shape[1])
        some = frames[:: max(len(frames) // FRAMES, 1)]
        shown.append(Strip(title, some.repeat(times, axis=1).repeat(times, axis=2)))
    return np.asarray(sheet(shown))
