"""Random generators for data: every draw follows from (seed, epoch, number, purpose), never from process state."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What is drawn. Each purpose has its own stream, so a change in one does not affect the others."""

    ORDER = 0
    FRAMES = 1
    MASK = 2
    CROP = 3
    AUGMENT = 4
    MIX = 5
    LAYERS = 6


def generator(seed: int, epoch: int, number: int, purpose: Purpose, copy: int = 0) -> np.random.Generator:
    """The generator of one draw.

    Args:
        number: index of the video, or of the mixing group in the epoch.
        copy: which augmented copy of the video.
    """
    return np.random.default_rng([seed, epoch, number, purpose, copy])


def epoch_order(seed: int, epoch: int, samples: int) -> list[int]:
    """The permutation of the samples in an epoch."""
    order: list[int] = generator(seed, epoch, 0, Purpose.ORDER).permutation(samples).tolist()
    return order


def mix_seed(seed: int, epoch: int, group: int) -> int:
    """The seed of how a mixing group is mixed."""
    return int(generator(seed, epoch, group, Purpose.MIX).integers(2**32))
