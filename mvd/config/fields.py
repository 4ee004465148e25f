"""How a field of a settings dataclass takes part in a stage's identity (mvd.identity)."""

from typing import Any

NOT_HASHED = {"hashed": False}  # metadata of a field that changes how a stage runs, but not its result


def since(default: Any) -> dict[str, Any]:
    """Metadata of a field that was added when run directories existed: hashed only if its value is not `default`.

    `default` is the value that describes all earlier runs, whose ids therefore do not change. It must never be changed,
    even if the field's own default is.
    """
    return {"since": default}
