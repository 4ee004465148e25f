"""One line of what the doctor found."""

from collections.abc import Callable
from typing import NamedTuple

from mvd.config import ConfigError


class Finding(NamedTuple):
    """subject: what was looked at. text: what was found or, if it is not ok, what is wrong and what to do."""

    subject: str
    ok: bool
    text: str


def examine(subject: str, look: Callable[[], str]) -> Finding:
    """The finding of a check that returns what it found, or raises ConfigError or OSError with what is wrong."""
    try:
        return Finding(subject, True, look())
    except ConfigError as error:
        return Finding(subject, False, str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return Finding(subject, False, f"{place}{error.strerror or error}")
