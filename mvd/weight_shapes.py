"""Names and shapes of the tensors in a weights file, without torch and without running anything that is in the file.

The launcher uses it to check teachers and given weights before anything is queued.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mvd.config import SIZES, ConfigError

Shapes = dict[str, tuple[int, ...]]
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class Geometry(NamedTuple):
    """What the shapes of a ViT's weights say of it: width in channels, depth in blocks."""

    width: int
    depth: int


def read_shapes(path: Path) -> Shapes:
    """Tensor name -> shape, of a .safetensors file or of a .pth file in PyTorch's zip format (1.6 and later).

    Nested dictionaries are flattened: the names are the innermost keys.

    Raises:
        ConfigError: the file is missing, or is neither.
    """
    try:
        if zipfile.is_zipfile(path):
            return _shapes_of_zip(path)
        return _shapes_of_safetensors(path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, ValueError, KeyError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{path} is neither a .safetensors file nor a .pth file: {error}") from error
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is damaged: {error}; download or write it again") from error


def geometry(shapes: Shapes) -> Geometry | None:
    """The encoder's geometry, or None if there are no transformer blocks with an attention projection."""
    blocks = {name: shape for name, shape in shapes.items() if _block_number(name) is not None}
    widths = [shape[1] for name, shape in blocks.items() if name.endswith("attn.qkv.weight") and len(shape) == 2]
    numbers = [number for name in blocks if (number := _block_number(name)) is not None]
    return Geometry(widths[0], max(numbers) + 1) if widths else None


def check_encoder(path: Path, size: str) -> str:
    """What a teacher's file holds, in a few words, if it is an encoder of that size.

    Raises:
        ConfigError: it cannot be read, or is of another size.
    """
    shapes = read_shapes(path)
    found, expected = geometry(shapes), SIZES[size].encoder
    if found is None:
        raise ConfigError(f"{path} holds {len(shapes)} tensors but no transformer blocks; use another file")
    if found != Geometry(expected.width, expected.depth):
        raise ConfigError(
            f"{path} holds an encoder of width {found.width} and depth {found.depth}, but size {size!r} has width "
            f"{expected.width} and depth {expected.depth}; use another file"
        )
    return f"{len(shapes)} tensors, width {found.width}, depth {found.depth}"


def _block_number(name: str) -> int | None:
    """The number of the encoder block that a weight is part of."""
    parts = name.removeprefix("module.").removeprefix("encoder.").removeprefix("backbone.").split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdigit() else None


def _shapes_of_safetensors(path: Path) -> Shapes:
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        if length > LARGEST_HEADER:
            raise ValueError("its header is too long")
        header = json.loads(handle.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _shapes_of_zip(path: Path) -> Shapes:
    with zipfile.ZipFile(path) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        with archive.open(member) as stream:
            content = _Reader(stream).load()
    return dict(_tensors(content))


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors in nested dictionaries, each under its innermost key; optimizer states come under numbers."""
    if isinstance(content, _Tensor):
        yield name, content.shape
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield from _tensors(value, key)


class _Tensor(NamedTuple):
    shape: tuple[int, ...]


class _Anything:
    """Stands for every object of a pickle but tensors and plain containers; takes any state and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Ordered(dict[Any, Any]):
    """collections.OrderedDict, whose pickled attributes (a state dict has `_metadata`) are dropped."""

    def __setstate__(self, _: Any) -> None: ...


def _rebuild_tensor(_storage: Any, _offset: int, size: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(tuple(size))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Reader(pickle.Unpickler):
    """Rebuilds nothing but plain containers: no class or function of the file is ever imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Ordered
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _rebuild_parameter
        return _Anything

    def persistent_load(self, _: Any) -> None:
        """A storage, whose content is not read."""
