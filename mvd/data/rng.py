"""Where every random choice about data comes from: (seed, epoch, number, purpose), never the state of a process."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What is drawn; each purpose has its own stream, so that a change in one leaves the others as they were."""

    ORDER = 0
    FRAMES = 1
    MASK = 2
    CROP = 3
    AUGMENT = 4
    MIX = 5
    LAYERS = 6


def generator(seed: int, epoch: int, number: int, purpose: Purpose, copy: int = 0) -> np.random.Generator:
    """The generator of one choice. `number` is a video's index or a group's place in the epoch, `copy` tells the
    augmented copies of a video apart."""
    return np.random.default_rng([seed, epoch, number, purpose, copy])


def epoch_order(seed: int, epoch: int, samples: int) -> list[int]:
    """The permutation of the samples in an epoch."""
    return generator(seed, epoch, 0, Purpose.ORDER).permutation(samples).tolist()
