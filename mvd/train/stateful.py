"""What goes into a checkpoint beside the network and its optimizer: the extension point."""

from collections.abc import Mapping
from typing import Any, Protocol


class Stateful(Protocol):
    """A part of a run whose state survives an interruption. The state must be JSON: it is kept in the manifest."""

    def state_dict(self) -> dict[str, Any]:
        """The state as of the last update, the same on every process."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state. Not called if the checkpoint has none for this part, or if there is no checkpoint."""
        ...


def collect(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Name -> state, for the manifest of a checkpoint."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Stateful], saved: Mapping[str, Any]) -> None:
    """Gives each part the state that a checkpoint has under its name."""
    saved = _by_name(saved)
    for name, part in parts.items():
        if name in saved:
            part.load_state_dict(saved[name])


def _by_name(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Version 0.1.0 merged the states of all parts into one flat dictionary."""
    if "left_out" not in saved:
        return saved
    return {
        "bad_updates": {name: saved[name] for name in ("losses", "left_out")},
        "skipped_files": {"replaced": saved["replaced"]},
        "window": saved["window"],
    }
