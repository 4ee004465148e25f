"""What a checkpoint contains besides the network and its optimizer: the extension point."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

States = dict[str, dict[str, Any]]  # name of a part -> its state


class Stateful(Protocol):
    """A part of a run whose state survives an interruption.

    The state maps names to JSON values, which the checkpoint's manifest contains, or to tensors, which are in a file
    of their own. It must not depend on the number of processes.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state after the last update, the same on every process."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state. Not called if there is no checkpoint, or none of this part."""
        ...


def collect(parts: Mapping[str, Stateful]) -> States:
    """The states of all parts, for a checkpoint."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Stateful], saved: Mapping[str, Any]) -> None:
    """Gives each part its state in a checkpoint."""
    saved = _by_name(saved)
    for name, part in parts.items():
        if name in saved:
            part.load_state_dict(saved[name])


def split_tensors(states: States) -> tuple[States, States]:
    """The JSON values of the states, and the tensors of those parts that have any."""
    values = {part: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for part, state in states.items()}
    tensors = {part: {k: v for k, v in state.items() if isinstance(v, Tensor)} for part, state in states.items()}
    return values, {part: state for part, state in tensors.items() if state}


def _by_name(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Version 0.1.0 merged the states of all parts into one flat dictionary."""
    if "left_out" not in saved:
        return saved
    return {
        "bad_updates": {name: saved[name] for name in ("losses", "left_out")},
        "skipped_files": {"replaced": saved["replaced"]},
        "window": saved["window"],
    }
