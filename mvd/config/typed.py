"""Applies `key=value` settings to frozen dataclasses: OmegaConf checks types, an unknown key gives the nearest one."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mvd.config.errors import ConfigError

Settings = TypeVar("Settings")
SCALARS: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Override:
    """One setting: its path of keys, its value, and its text as the user wrote it, for errors."""

    path: tuple[str, ...]
    value: Any
    text: str

    @property
    def layer(self) -> dict[str, Any]:
        layer: Any = self.value
        for key in reversed(self.path):
            layer = {key: layer}
        return dict(layer)


def merge_typed(base: Any, *layers: Any) -> Any:
    """Merges OmegaConf layers into a structured base, whose types check them."""
    OmegaConf.set_readonly(base, False)  # that of a frozen dataclass is read-only
    return OmegaConf.merge(base, *layers)


def parse_override(text: str) -> Override:
    """`pretrain.optimization.epochs=2`: dots lead into sections, the value is YAML.

    Raises:
        ConfigError: a key is empty, or the value is not valid YAML.
    """
    key, _, value = text.partition("=")
    path = tuple(key.split("."))
    if not all(path):
        raise ConfigError(f"{text}: the key is not complete; write it as section.field=value")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except Exception as error:  # PyYAML raises many kinds
        raise ConfigError(f"{text}: the value cannot be read as YAML; put quotes around it") from error
    return Override(path, parsed["value"], text)  # type: ignore[index,call-overload]


def apply_overrides(settings: Settings, overrides: Iterable[Override]) -> Settings:
    """A copy of a settings dataclass with the overrides merged in order; the dataclass validates the result.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing field, or an invalid combination.
    """
    merged = OmegaConf.structured(settings)
    overrides = list(overrides)
    for override in overrides:
        expected = check_keys(type(settings), override)
        try:
            merged = merge_typed(merged, override.layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list instead of a mapping
            raise ConfigError(_wrong_type(override, expected, error)) from error
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_source(error, overrides)}{error.full_key} is missing; set it as well") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_source(error, overrides)}{_first_line(error)}") from error


def check_types(settings: Any) -> None:
    """Checks that the fields of a settings dataclass, which Python does not check, have their declared types.

    Raises:
        ConfigError: a field has a value of the wrong type.
    """
    try:
        OmegaConf.structured(settings)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or error.key}: {_first_line(error)}") from error


def _source(error: OmegaConfBaseException, overrides: Sequence[Override]) -> str:
    """The text of the setting that an error's key comes from, with a colon."""
    key = f"{error.full_key}."
    texts = [override.text for override in overrides if key.startswith(".".join(override.path) + ".")]
    return f"{texts[-1]}: " if texts else ""


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0]


def check_keys(settings_type: type, override: Override) -> Any:
    """Follows an override's keys through the dataclasses and returns the type of its value.

    Raises:
        ConfigError: a key does not exist; the message has the nearest one and all of that level.
    """
    hint: Any = settings_type
    for position, key in enumerate(override.path):
        section = ".".join(override.path[:position])
        try:
            hint = _step_into(hint, key, section, override.text)
        except ConfigError as error:
            found = _similar_below(settings_type, section, key)
            if not found:
                raise
            raise ConfigError(f"{str(error).partition(' (nearest')[0]}; did you mean {' or '.join(found)}?") from error
    _check_mapping(hint, override.value, ".".join(override.path), override.text)
    return hint


def paths_of(settings_type: Any, section: str = "") -> list[str]:
    """The dotted paths of all settings of a dataclass, those of its sections included."""
    paths: list[str] = []
    for name, hint in get_type_hints(settings_type).items():
        path, inner = f"{section}{name}", _without_none(hint)
        paths += paths_of(inner, f"{path}.") if dataclasses.is_dataclass(inner) else [path]
    return paths


def _similar_below(settings_type: type, section: str, key: str) -> list[str]:
    """The settings below a section that have the name of an unknown key, or else one that starts or ends with it."""
    below = [path for path in paths_of(settings_type) if path.startswith(section and f"{section}.")]
    names = {path: path.rpartition(".")[2] for path in below}
    same = [path for path in below if names[path] == key]
    return same or [path for path in below if names[path].endswith(f"_{key}") or names[path].startswith(f"{key}_")]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: a, b)`: up to three similar names, or else the most similar one."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or difflib.get_close_matches(name, names, 1, 0.0)
    return f" (nearest: {', '.join(close)})"


def _check_mapping(hint: Any, value: Any, section: str, text: str) -> None:
    inner = _without_none(hint)
    sectioned = dataclasses.is_dataclass(inner) or get_origin(inner) is dict
    # OmegaConf accepts a list in a dict[str, str], and its error for one in a section names only the outermost section.
    if isinstance(value, list) and (inner in SCALARS or sectioned):
        raise ConfigError(f"{text}: {section} must be {_describe(hint)}, got {value!r}")
    if isinstance(value, Mapping):
        for key, nested in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{text}: the keys of {section} must be strings, got {key!r}; quote it")
            _check_mapping(_step_into(hint, key, section, text), nested, f"{section}.{key}", text)


def _step_into(hint: Any, key: str, section: str, text: str) -> Any:
    hint = _without_none(hint)
    if dataclasses.is_dataclass(hint):
        fields = get_type_hints(hint)
        if key not in fields:
            where = section or f"a {hint.__name__.lower()}"  # type: ignore[union-attr]
            known = ", ".join(fields)
            raise ConfigError(f"{text}: {where} has no key {key!r}{nearest(key, fields)}; use one of {known}")
        return fields[key]
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    raise ConfigError(f"{text}: {section} is {_describe(hint)} and has no key {key!r}; set {section} itself")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (choice for choice in get_args(hint) if choice is not type(None))
    return hint


def _wrong_type(override: Override, expected: Any, error: Exception) -> str:
    path, value = override.path, override.value
    full_key = tuple(str(getattr(error, "full_key", None) or "").split("."))
    if isinstance(value, Mapping) and full_key[: len(path)] == path and len(full_key) > len(path):
        for key in full_key[len(path) :]:
            value, expected = value[key], _step_into(expected, key, ".".join(path), override.text)
        path = full_key
    given = "null" if value is None else repr(value)
    return f"{override.text}: {'.'.join(path)} must be {_describe(expected)}, got {given}"


def _describe(hint: Any) -> str:
    inner = _without_none(hint)
    if inner is not hint:
        return f"{_describe(inner)} or null"
    if inner in SCALARS:
        return SCALARS[inner]
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(inner))
    if get_origin(inner) is list:
        return "a list of strings"
    if get_origin(inner) is tuple:
        return f"a list of {len(get_args(inner))} numbers"
    if dataclasses.is_dataclass(inner):
        return "a section with the keys " + ", ".join(f.name for f in dataclasses.fields(inner))
    return "a mapping"
