"""What a pickled checkpoint may hold beside tensors and plain containers.

Training code often pickles its settings, its optimizer and its random states beside the weights: an
argparse.Namespace, learning rates that are NumPy scalars, paths. The official MVD, MAE and VideoMAE programs do. None
of it is needed, so none of it is rebuilt: an object that does nothing takes its place.
"""

from collections.abc import Callable
from typing import Any

PATHS = ("", "Posix", "Windows", "Pure", "PurePosix", "PureWindows")
# Classes and functions by the names that they have or have had, in NumPy 1 and 2, and in Python before and after 3.13.
IGNORED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"pathlib{module}.{kind}Path" for module in ("", "._local") for kind in PATHS),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta", "timezone")),
    # Settings of OmegaConf and Hydra.
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
)


class Ignored:
    """Stands for an object that is not rebuilt; takes any arguments and any state, and keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def safe_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """For torch.serialization.safe_globals: the names that may occur in a pickle, all standing for Ignored."""
    return [(Ignored, name) for name in IGNORED]
