"""The learning rate of every update."""

import numpy as np
from numpy.typing import NDArray


def cosine_schedule(
    peak: float, floor: float, epochs: int, warmup_epochs: float, steps_per_epoch: int
) -> NDArray[np.float64]:
    """Linear warmup from exactly 0 to the peak, then half a cosine towards the floor: one value an update.

    The peak comes twice, as the last warmup value and the first of the cosine, and the floor is never quite reached
    (QUIRKS 32).
    """
    updates = epochs * steps_per_epoch
    warmup = np.linspace(0, peak, int(warmup_epochs * steps_per_epoch))
    progress = np.arange(updates - len(warmup)) / max(updates - len(warmup), 1)
    return np.concatenate([warmup, floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * progress))])
