"""Random masks; True means masked."""

import numpy as np

from mvd.config.sizes import ClipShape


def masked_count(positions: int, ratio: float) -> int:
    """How many of the positions of an image or a slice are masked."""
    return int(ratio * positions)


def random_mask(rng: np.random.Generator, positions: int, ratio: float) -> np.ndarray:
    """Mask `masked_count` random positions of an image (MAE): bool (positions,)."""
    masked = masked_count(positions, ratio)
    mask = np.repeat([False, True], [positions - masked, masked])
    rng.shuffle(mask)
    return mask


def tube_mask(rng: np.random.Generator, clip: ClipShape, ratio: float) -> np.ndarray:
    """Tube masking (VideoMAE): one random mask, the same in every temporal slice: bool (tokens,) in (t, h, w) order.

    At a ratio of 0.9 and 224 pixels, 176 of the 196 positions are masked.
    """
    return np.tile(random_mask(rng, clip.positions, ratio), clip.slices)
