"""Which keys of a checkpoint become which weights of a network.

One set of rules for the loader (mvd.models.checkpoints) and for the launcher, which checks files before a job is
queued. Must not import torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from mvd.config import ConfigError

# Keys under which training programs store the state dict, the preferred one first.
CONTAINERS = ("model", "module", "state_dict", "model_state", "model_state_dict", "model_ema", "state_dict_ema")
# Prefixes of keys, in any order: of DistributedDataParallel, torch.compile, Lightning, and of an encoder in a network.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
HEAD = ("head.weight", "head.bias")
CLASSIFIER_HEAD = ("fc_norm.weight", "fc_norm.bias", *HEAD)
LISTED = 8  # problems in a message
PATHS = ("Posix", "Windows", "Pure", "PurePosix", "PureWindows")
# Classes and functions that a pickle may hold beside weights, by the names that they have or have had (in NumPy 1 and
# 2, in Python before and after 3.13). None of them is imported or called.
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

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ConfigError):
    """Weights that cannot be used; one sentence: what is wrong, where, and how to fix it."""


class Tensors(NamedTuple):
    """A state dict, and a note on where in the file it was if it was in an unusual place or one of several."""

    entries: dict[str, Any]
    notes: tuple[str, ...]


class Form(NamedTuple):
    """A tensor's shape, its dtype without `torch.`, and its kind: "dense", or one that cannot be loaded."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: str = "dense"


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a network.

    sources: name of a weight -> the keys that it comes from. missing: weights that start freshly initialised, which
    only a classifier's head may. notes: what was done to make it fit, each part of a sentence.
    """

    sources: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def unwrap(content: Any, kind: type[T], origin: str) -> Tensors:
    """The tensors (instances of `kind`) of a checkpoint's content, which may be in nested containers.

    Raises:
        CheckpointError: there are no tensors; says under which entry there are some.
    """
    path: list[str] = []
    unused: list[str] = []
    for _ in CONTAINERS:  # a limit, since a pickle may hold itself
        inner = {key: content.get(key) for key in CONTAINERS} if isinstance(content, Mapping) else {}
        found = [key for key, value in inner.items() if _has_tensors(value, kind)]
        if not found:
            break
        path.append(found[0])
        unused += found[1:]
        content = inner[found[0]]
    items = list(content.items()) if isinstance(content, Mapping) else []
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, kind)}
    if not tensors:
        others = [key for key, value in items if _has_tensors(value, kind)]
        hint = f"save the part under {others[0]!r} as a file of its own" if others else "give a state dict"
        raise CheckpointError(
            f"{origin} holds no weights, neither directly nor under any of {', '.join(CONTAINERS)}; {hint}"
        )
    notes = [f"taken from {'.'.join(path)}"] if unused or any(key not in CONTAINERS[:2] for key in path) else []
    return Tensors(tensors, tuple(note + (f", not from {', '.join(unused)}" if unused else "") for note in notes))


def fit(wanted: Shapes, given: Mapping[str, Form], origin: str, network: str, *, drop_other_head: bool = False) -> Fit:
    """Finds the weights of a network in a checkpoint, under known prefixes and in either layout of attention biases.

    A classifier can start from a file without fc_norm and head. With drop_other_head also from a classifier of other
    classes, whose head is not used.

    Raises:
        CheckpointError: a key is missing, or has another shape or type.
    """
    notes = _other_head(wanted, given, origin) if drop_other_head else []
    if notes:
        given = {key: form for key, form in given.items() if plain_key(key) not in HEAD}
    sources = find_sources(wanted, given, origin)
    missing = tuple(name for name in wanted if name not in sources)
    fresh = HEAD if notes else CLASSIFIER_HEAD
    absent = () if missing == tuple(name for name in wanted if name in fresh) else missing
    problems = [f"{name} is missing" for name in absent]
    for name, keys in sources.items():
        problems += _misfit(name, wanted[name], keys, given)
    problems = list(dict.fromkeys(problems))  # a full bias is the source of two weights
    if problems:
        raise CheckpointError(f"{origin} does not fit this {network}: {_sum_up(problems, absent, given)}")
    return Fit(sources, missing, (*_prefixes_removed(sources), *notes))


def check_finite(bad: Iterable[str], origin: str) -> None:
    """Refuses a checkpoint in which these weights, if any, hold values that are not numbers.

    Raises:
        CheckpointError: there are some.
    """
    names = list(bad)
    if names:
        more = f" and {len(names) - LISTED} more weights" if len(names) > LISTED else ""
        raise CheckpointError(
            f"{origin} holds NaN or infinite values in {', '.join(names[:LISTED])}{more}; use an earlier checkpoint of "
            "that training, or download the file again"
        )


def plain_key(key: str) -> str:
    """A key without the prefixes of the wrappers and networks that its network was in."""
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key


def is_position_table(name: str) -> bool:
    return "pos_embed" in name.rpartition(".")[2]


def find_sources(names: Iterable[str], keys: Iterable[str], origin: str) -> dict[str, tuple[str, ...]]:
    """Name of a weight -> the keys that it comes from; names that no key fits are left out.

    Raises:
        CheckpointError: several keys differ only in their prefixes.
    """
    by_plain: dict[str, list[str]] = {}
    for key in keys:
        by_plain.setdefault(plain_key(key), []).append(key)

    def find(name: str) -> str | None:
        candidates = by_plain.get(plain_key(name), [])
        for exact in (name, plain_key(name)):
            if exact in candidates:
                return exact
        if len(candidates) > 1:
            raise CheckpointError(
                f"{origin} has {' and '.join(candidates)}, which are the same key with different prefixes; "
                "keep the network that you want to use"
            )
        return candidates[0] if candidates else None

    found = {name: (one,) if (one := find(name)) is not None else _other_biases(name, find) for name in names}
    return {name: keys for name, keys in found.items() if keys}


def _other_biases(name: str, find: Callable[[str], str | None]) -> tuple[str, ...]:
    """The keys of an attention bias in the other layout: `q_bias` and `v_bias`, or one `qkv.bias`."""
    attention, _, last = name.rpartition(".")
    if last in ("q_bias", "v_bias"):
        full = find(f"{attention}.qkv.bias")
        return () if full is None else (full,)
    if name.endswith(".qkv.bias"):
        attention = name.removesuffix(".qkv.bias")
        parts = [find(f"{attention}.{part}") for part in ("q_bias", "v_bias")]
        return tuple(part for part in parts if part is not None) if None not in parts else ()
    return ()


def _other_head(wanted: Shapes, given: Mapping[str, Form], origin: str) -> list[str]:
    """A note if the checkpoint is a classifier like the wanted one, but of another number of classes."""
    keys = find_sources(HEAD[:1], given, origin).get(HEAD[0])
    own = wanted[HEAD[0]]
    shape = given[keys[0]].shape if keys else own
    if len(shape) != len(own) or shape[0] == own[0] or shape[1:] != own[1:]:
        return []
    return [f"its head for {shape[0]} classes is replaced by a new one for {own[0]}"]


def _misfit(name: str, wanted: tuple[int, ...], keys: tuple[str, ...], given: Mapping[str, Form]) -> list[str]:
    """Problems of the weight `name`, of shape `wanted`, with the keys that it comes from."""
    expected = wanted
    if len(keys) == 2:  # a full bias from its query and value parts
        expected = (wanted[0] // 3,)
    elif keys[0].endswith(".qkv.bias") and not name.endswith(".qkv.bias"):
        expected = (3 * wanted[0],)
    problems = []
    for key in keys:
        form = given[key]
        if form.kind != "dense":
            problems.append(f"{key} is a {form.kind} tensor instead of a dense one")
        elif form.shape != expected:
            problems.append(f"{key} is {form.shape} instead of {expected}")
        elif not form.dtype.startswith(("float", "bfloat")):
            problems.append(f"{key} has dtype {form.dtype} instead of a floating-point type")
    return problems


def _prefixes_removed(sources: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Notes on prefixes of keys that the network's own names do not have."""
    pairs = {(_prefix(key), _prefix(name)): None for name, keys in sources.items() for key in keys}
    return [f"without the prefix {prefix}" for prefix, own in pairs if prefix not in ("", own)]


def _prefix(key: str) -> str:
    return key.removesuffix(plain_key(key))


def _sum_up(problems: list[str], absent: tuple[str, ...], given: Mapping[str, Form]) -> str:
    rest = len(problems) - LISTED
    listed = ", ".join(problems[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
    unknown = _unknown_prefix(absent, given)
    if unknown is not None:
        return f"{listed}; its keys start with {unknown!r}, which is not a known prefix: remove it from the keys"
    if any(plain_key(problem).startswith("head.") for problem in problems):
        return f"{listed}; set the number of classes to the checkpoint's, or load a pre-trained encoder"
    return f"{listed}; choose a checkpoint of this network and size"


def _unknown_prefix(absent: tuple[str, ...], given: Mapping[str, Form]) -> str | None:
    """What precedes the names of all missing weights in the checkpoint's keys, if the embedding is one of them."""
    first = next((plain_key(name) for name in absent if name.endswith("patch_embed.proj.weight")), None)
    if first is None:
        return None
    prefixes = [key.removesuffix(first) for key in given if key.endswith(f".{first}")]
    names = [plain_key(name) for name in absent if plain_key(name) not in CLASSIFIER_HEAD and "_bias" not in name]
    return next((prefix for prefix in prefixes if all(prefix + name in given for name in names)), None)


def _has_tensors(content: Any, kind: type) -> bool:
    """Whether a value is a dictionary with tensors, or one of a container."""
    if not isinstance(content, Mapping):
        return False
    containers = any(isinstance(content.get(key), Mapping) for key in CONTAINERS)
    return containers or any(isinstance(value, kind) for value in content.values())
