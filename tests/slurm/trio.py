"""Three rows whose students can share one pass of their teachers; that of `trio_a` is complete after half the time."""

import dataclasses

from experiments.demo import optimization
from tests.slurm.tiny import rows as tiny

first = tiny[0]
rows = tuple(
    dataclasses.replace(
        first,
        name=f"trio_{name}",
        pretrain=dataclasses.replace(first.pretrain, optimization=optimization(epochs, peak_lr=peak_lr, batch=8)),
    )
    for name, epochs, peak_lr in (("a", 1, 5e-4), ("b", 2, 5e-4), ("c", 2, 1e-3))
)
