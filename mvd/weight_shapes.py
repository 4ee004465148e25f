"""Names, shapes and places of the tensors in a weights file, without torch and without running anything in the file.

The launcher uses it to check teachers and given weights before anything is queued.
"""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mvd.files import DISK_FAULTS
from mvd.weight_keys import IGNORED, CheckpointError, Form, unwrap

LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a .pth file of PyTorch before 1.6
# Bytes per value.
ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2}
ITEM_SIZES |= {"int8": 1, "uint8": 1, "bool": 1}
SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32"}
STORAGE_TYPES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
STORAGE_TYPES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
# What torch.load(weights_only=True) takes, besides names in torch and mvd.weight_keys.IGNORED.
PLAIN = ["collections.OrderedDict", "collections.Counter", "_codecs.encode"]
PLAIN += ["builtins.bytearray", "builtins.set", "builtins.complex"]
ODD_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantized",
}


class Stored(NamedTuple):
    """A tensor of a file. strides and offset: in values, of its storage, which has `storage` as its key."""

    form: Form
    strides: tuple[int, ...] = ()
    offset: int = 0
    storage: str = ""


class Span(NamedTuple):
    """Where a storage is in its file, in bytes."""

    start: int
    length: int


class WeightFile(NamedTuple):
    """The state dict of a file. notes: see mvd.weight_keys.Tensors. spans: storage -> its place, if it is readable.

    texts: strings beside the state dict: a .safetensors file's metadata, or entries of a .pth file's dictionary.
    """

    tensors: dict[str, Stored]
    notes: tuple[str, ...]
    spans: dict[str, Span]
    texts: dict[str, str]

    @property
    def forms(self) -> dict[str, Form]:
        return {name: tensor.form for name, tensor in self.tensors.items()}


def read_header(path: Path) -> WeightFile:
    """The tensors of a .safetensors file or of a .pth file, both in the state dict that the loader would take.

    Raises:
        CheckpointError: the file is missing, or is neither, or holds no weights.
        OSError: the disk, or missing permission.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with open(path, "rb") as handle:
            if is_safetensors(path):
                content, spans = _read_safetensors(handle)
            elif zipfile.is_zipfile(handle):
                content, spans = _read_zip(handle, path)
            else:
                content, spans = _read_legacy(handle, path)
        texts = (
            {key: text for key, text in content.items() if isinstance(text, str)} if isinstance(content, dict) else {}
        )
        return WeightFile(*unwrap(content, Stored, str(path)), spans, texts)
    except CheckpointError:
        raise
    except Exception as error:  # malicious or damaged files can cause any exception
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        raise CheckpointError(
            f"{path} is damaged, or neither a .safetensors nor a .pth file; download or write it again"
        ) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file is of the safetensors format, by its name or its first bytes."""
    with open(path, "rb") as handle:
        return path.suffix == ".safetensors" or handle.read(9)[8:] == b"{"


def _read_safetensors(handle: BinaryIO) -> tuple[Any, dict[str, Span]]:
    (length,) = struct.unpack("<Q", handle.read(8))
    if length > LARGEST_HEADER:
        raise ValueError("its header is too long")
    header = json.loads(handle.read(length))
    metadata = header.pop("__metadata__", None) or {}
    tensors, spans = {}, {}
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        dtype = SAFETENSORS_TYPES.get(entry["dtype"], str(entry["dtype"]).lower())
        start, end = entry["data_offsets"]
        tensors[name] = Stored(Form(shape, dtype), _dense_strides(shape), 0, name)
        spans[name] = Span(8 + length + start, end - start)
    size = handle.seek(0, 2)
    if any(span.start + span.length > size for span in spans.values()):
        raise EOFError("it is truncated")
    return {**metadata, "model": tensors}, spans


def _read_zip(handle: BinaryIO, path: Path) -> tuple[Any, dict[str, Span]]:
    """A .pth file of PyTorch 1.6 and later: a pickle, and a member of the archive for each storage."""
    with zipfile.ZipFile(handle) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        with archive.open(pickled) as stream:
            content = _Reader(stream, path).load()
        root = pickled.removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
        data = [item for item in archive.infolist() if item.filename.startswith(f"{root}data/")]
        spans = {}
        for item in data if order == b"little" else ():
            if item.compress_type == zipfile.ZIP_STORED:
                handle.seek(item.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", handle.read(4))
                start = item.header_offset + 30 + name_length + extra_length
                spans[item.filename.removeprefix(f"{root}data/")] = Span(start, item.file_size)
    return content, spans


def _read_legacy(handle: BinaryIO, path: Path) -> tuple[Any, dict[str, Span]]:
    """A .pth file of PyTorch before 1.6: pickles of magic number, version, system, content and storages; values."""
    handle.seek(0)
    if _Reader(handle, path).load() != LEGACY_MAGIC:
        raise ValueError("it has another beginning")
    _version, system = _Reader(handle, path).load(), _Reader(handle, path).load()
    reader = _Reader(handle, path)
    content = reader.load()
    spans = {}
    for key in _Reader(handle, path).load():
        (count,) = struct.unpack("<q", handle.read(8))
        item_size = reader.item_sizes.get(key, 0)
        if item_size == 0 or not system.get("little_endian", True):
            break  # where the next storage begins is unknown
        spans[key] = Span(handle.tell(), count * item_size)
        handle.seek(count * item_size, 1)
    return content, spans


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class _Storage(NamedTuple):
    dtype: str
    key: str


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


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], strides: Any, *_: Any) -> Stored:
    return Stored(Form(tuple(size), storage.dtype), tuple(strides), offset, storage.key)


def _rebuild_tensor_of_any_type(_storage: Any, _offset: int, size: tuple[int, ...], *_: Any) -> Stored:
    """For dtypes without a storage type of their own, such as float8; its values cannot be read here."""
    return Stored(Form(tuple(size), "float8"))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes of its own."""
    return _rebuild_tensor(*arguments) if function is _rebuild_tensor else _Anything()


class _Reader(pickle._Unpickler):
    """Rebuilds nothing but plain containers: no class or function of the file is ever imported or called.

    The Unpickler in Python, since the one in C allocates as much memory as a damaged file says.
    """

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self.path = path
        self.item_sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Ordered
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            return _rebuild_tensor_of_any_type
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch._utils" and name in ODD_TENSORS:
            return lambda *_: Stored(Form((), kind=ODD_TENSORS[name]))
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_from_type
        if module == "torch" and name.endswith("Storage"):
            kind = name.removesuffix("Storage")
            return type(name, (_Anything,), {"dtype": STORAGE_TYPES.get(kind, kind.lower())})
        known = f"{module}.{name}".replace("__builtin__", "builtins")  # the older name, which pickles keep
        if module.partition(".")[0] != "torch" and known not in (*PLAIN, *IGNORED):
            raise CheckpointError(
                f"{self.path} is not a plain checkpoint: it contains a {known}, which could run code when loaded; if "
                "you trust its source, convert it to .safetensors"
            )
        return _Anything

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, of which only dtype and key are kept."""
        _, storage_type, key, _, *_ = pid
        dtype = getattr(storage_type, "dtype", "untyped")
        self.item_sizes[key] = ITEM_SIZES.get(dtype, 0)
        return _Storage(dtype, key)
