"""RandAugment for clips: timm draws the operations, numpy and OpenCV apply them to a clip as one array.

Only the region is computed that the later crop reads: `regions` carries its box backwards through the operations.
How close the results are to Pillow's, which timm uses, is said in colours.py and warps.py.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform

from mvd.config import ConfigError
from mvd.data.clip.crops import Box, cut
from mvd.data.randaugment import color as colours
from mvd.data.randaugment import geometric as warps

OPERATIONS = colours.OPERATIONS | warps.OPERATIONS  # by the names of timm's functions


class Operation(NamedTuple):
    """One drawn operation, by the name of timm's function, with its argument where it has one."""

    name: str
    argument: float = 0.0


def rand_augment_policy(policy: str) -> RandAugment:
    """timm's RandAugment of that description, with the official fill and interpolation."""
    return rand_augment_transform(policy, {"img_mean": (warps.FILL,) * 3, "interpolation": Image.Resampling.BICUBIC})


@cache
def _recorder(policy: str) -> RandAugment:
    """The same policy, but for a list in place of an image: each operation appends itself with its argument."""
    recorder = rand_augment_policy(policy)
    for op in recorder.ops:
        name = op.aug_fn.__name__
        if name not in OPERATIONS:
            raise ConfigError(f"augmentation.auto={policy}: {name} is not available for clips; choose another policy")
        op.aug_fn = partial(_record, name)
    return recorder


def _record(name: str, drawn: list[Operation], *arguments: float, **_: object) -> list[Operation]:
    return [*drawn, Operation(name, *arguments)]


def draw_operations(policy: str, rng: np.random.Generator) -> list[Operation]:
    """Draws the operations of a clip and their arguments, as timm does for an image.

    timm draws from the global generators; they are set to one drawn seed and put back afterwards.
    """
    seed = int(rng.integers(2**32))
    with _global_generators_kept():
        random.seed(seed)
        np.random.seed(seed)
        return _recorder(policy)([])


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)


def apply_operations(frames: np.ndarray, operations: Sequence[Operation], box: Box) -> np.ndarray:
    """A box of the frames, uint8 (T, H, W, 3), after the operations: uint8 (T, box.height, box.width, 3)."""
    size = frames.shape[1:3]
    region, *following = regions(operations, box, size)
    clip = cut(frames, region)
    for operation, after in zip(operations, following, strict=True):
        clip = OPERATIONS[operation.name].apply(clip, operation.argument, region, after, size)
        region = after
    return clip


def regions(operations: Sequence[Operation], box: Box, size: tuple[int, int]) -> list[Box]:
    """The part of a frame that is needed before each operation, and at last the box itself."""
    needed = [box]
    for operation in reversed(operations):
        needed.append(OPERATIONS[operation.name].needs(needed[-1], operation.argument, size))
    return needed[::-1]
