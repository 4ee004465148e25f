"""How a field of a settings dataclass takes part in a stage's identity (mvd.identity)."""

from typing import Any

NOT_HASHED = {"hashed": False}  # field(metadata=...): says how a stage runs, never what it computes


def since(default: Any) -> dict[str, Any]:
    """Metadata of a field that was added after run directories existed: left out of the hash while it equals `default`.

    `default` is what every earlier run did, so their ids stay as they are; it must never be changed afterwards, even
    if the field's own default is.
    """
    return {"since": default}
