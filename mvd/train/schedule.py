"""The learning rate of every update."""

import numpy as np
from numpy.typing import NDArray


def cosine_schedule(
    peak: float, floor: float, epochs: int, warmup_epochs: float, steps_per_epoch: int
) -> NDArray[np.float64]:
    """Linear warmup from 0 to `peak`, then half a cosine towards `floor`: one value per update.

    The peak occurs twice, as the last value of the warmup and the first of the cosine; the floor is not reached
    (QUIRKS 32).
    """
    updates = epochs * steps_per_epoch
    warmup = np.linspace(0, peak, int(warmup_epochs * steps_per_epoch))
    progress = np.arange(updates - len(warmup)) / max(updates - len(warmup), 1)
    return np.concatenate([warmup, floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * progress))])
