"""Which tokens a student or a teacher in training does not see; True means masked."""

import numpy as np

from mvd.config.sizes import ClipShape


def random_mask(rng: np.random.Generator, positions: int, ratio: float) -> np.ndarray:
    """A random mask of int(ratio x positions) of the positions of an image (MAE): bool (positions,)."""
    masked = int(ratio * positions)
    mask = np.repeat([False, True], [positions - masked, masked])
    rng.shuffle(mask)
    return mask


def tube_mask(rng: np.random.Generator, clip: ClipShape, ratio: float) -> np.ndarray:
    """One random mask of the positions, the same in every temporal slice: bool (tokens,) in (t, h, w) order.

    176 of the 196 positions at a ratio of 0.9 and 224 pixels (VideoMAE's tube masking).
    """
    return np.tile(random_mask(rng, clip.positions, ratio), clip.slices)
