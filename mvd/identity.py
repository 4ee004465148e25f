"""Stage ids: the only module that knows what is hashed.

The hash covers the recipe, the records of its sizes, and the ids of its inputs. A field marked NOT_HASHED is excluded;
a field marked `since(default)`, which was added later, is excluded if it has that value, so that the ids of existing
run directories never change (mvd.config.fields).
"""

import dataclasses
import hashlib
import json
from typing import Any

from mvd.config import SIZES, Recipe, Size


def identity(value: Any) -> Any:
    """The part of a recipe that determines its result, as plain containers."""
    if dataclasses.is_dataclass(value):
        return {f.name: identity(getattr(value, f.name)) for f in dataclasses.fields(value) if _is_hashed(f, value)}
    if isinstance(value, dict):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # 40 and 40.0 in a row file are the same setting
    return [identity(v) for v in value] if isinstance(value, list | tuple) else value


def _is_hashed(setting: dataclasses.Field[Any], owner: Any) -> bool:
    marks = setting.metadata
    added_later = "since" in marks and getattr(owner, setting.name) == marks["since"]
    return marks.get("hashed", True) and not added_later


def sizes_of(recipe: Recipe) -> dict[str, Size]:
    """Name -> record of each size in a recipe."""
    names = (getattr(recipe, key, None) for key in ("size", "student", "teacher"))
    return {name: SIZES[name] for name in names if name is not None}


def stage_id(kind: str, name: str, recipe: Recipe, input_ids: dict[str, str]) -> str:
    """`<kind>-<name>-<8 hex>`; the digest covers the recipe, its sizes and the ids of its inputs."""
    facts = {"kind": kind, "recipe": identity(recipe), "sizes": identity(sizes_of(recipe)), "inputs": input_ids}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{kind}-{name}-{digest}"
