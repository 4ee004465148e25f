"""RandAugment for clips: timm draws the operations, numpy and OpenCV apply them to a clip as one array.

Only the region that the later crop reads is computed: `regions` propagates the crop's box backwards through the
operations. color.py and geometric.py state how close the results are to Pillow's, which timm uses.
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
from mvd.data.clip.crops import Box, Frames, cut
from mvd.data.randaugment import color, geometric

OPERATIONS = color.OPERATIONS | geometric.OPERATIONS  # keyed by the names of timm's functions


class Operation(NamedTuple):
    """One drawn operation: the name of timm's function, and its argument if it takes one."""

    name: str
    argument: float = 0.0


def rand_augment_policy(policy: str) -> RandAugment:
    """timm's RandAugment of a policy string, with the fill and interpolation of the official release."""
    settings = {"img_mean": (geometric.FILL,) * 3, "interpolation": Image.Resampling.BICUBIC}
    augment: RandAugment = rand_augment_transform(policy, settings)
    return augment


@cache
def _recorder(policy: str) -> RandAugment:
    """The same policy for a list instead of an image: each operation appends itself with its argument."""
    recorder = rand_augment_policy(policy)
    for op in recorder.ops:
        name = op.aug_fn.__name__
        if name not in OPERATIONS:
            raise ConfigError(f"augmentation.auto={policy}: {name} is not implemented for clips; choose another policy")
        op.aug_fn = partial(_record, name)
    return recorder


def _record(name: str, drawn: list[Operation], *arguments: float, **_: object) -> list[Operation]:
    return [*drawn, Operation(name, *arguments)]


def draw_operations(policy: str, rng: np.random.Generator) -> list[Operation]:
    """Draw the operations of a clip and their arguments, as timm does for an image.

    timm draws from the global generators; they are seeded for the draw and restored afterwards.
    """
    seed = int(rng.integers(2**32))
    with _global_generators_kept():
        random.seed(seed)
        np.random.seed(seed)
        drawn: list[Operation] = _recorder(policy)([])
        return drawn


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)


def apply_operations(frames: Frames, operations: Sequence[Operation], box: Box) -> Frames:
    """Apply the operations to frames and crop a box: uint8 (T, H, W, 3) -> uint8 (T, box.height, box.width, 3)."""
    size = frames[0].shape[:2]
    region, *following = regions(operations, box, size)
    clip = cut(frames, region)
    for operation, after in zip(operations, following, strict=True):
        clip = OPERATIONS[operation.name].apply(clip, operation.argument, region, after, size)
        region = after
    return clip


def regions(operations: Sequence[Operation], box: Box, size: tuple[int, int]) -> list[Box]:
    """The region of a frame that is needed before each operation, and finally the box itself."""
    needed = [box]
    for operation in reversed(operations):
        needed.append(OPERATIONS[operation.name].needs(needed[-1], operation.argument, size))
    return needed[::-1]
