"""What a pickled checkpoint may hold beside tensors and plain containers.

Training code often pickles its settings, its optimizer and its random states beside the weights: an
argparse.Namespace, learning rates that are NumPy scalars, paths. The official MVD, MAE and VideoMAE programs do. None
of it is needed, so none of it is rebuilt: an object that does nothing takes its place.
"""

from collections.abc import Callable
from typing import Any

from mvd.weight_keys import IGNORED


class Ignored:
    """Stands for an object that is not rebuilt; takes any arguments and any state, and keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def safe_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """For torch.serialization.safe_globals: the names that may occur in a pickle, all standing for Ignored."""
    return [(Ignored, name) for name in IGNORED]
