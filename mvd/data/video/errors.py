"""Errors raised for a file that cannot be decoded."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Errors of the machine, the disk or the network: they say nothing about the file's content.
TEMPORARY = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EINTR"),
        *("ETIMEDOUT", "ESTALE", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "EHOSTDOWN", "ESHUTDOWN", "EBUSY"),
    )
    if hasattr(errno, name)
}


class Unreadable(RuntimeError):
    """A file that cannot be decoded: its path, the reason, and whether another attempt may succeed (temporary)."""

    def __init__(self, path: str, reason: str, temporary: bool = False) -> None:
        super().__init__(path, reason, temporary)  # all of them, so that the error can be sent between processes
        self.path = path
        self.reason = reason
        self.temporary = temporary

    def __str__(self) -> str:
        return f"{self.path} cannot be read: {self.reason}"


class UnreadableVideo(Unreadable):
    """A video that cannot be opened, that is damaged, or whose frames cannot be put in order."""


class UnreadableImage(Unreadable):
    """An image that cannot be decoded."""


@contextmanager
def unreadable(path: str) -> Iterator[None]:
    """Turns whatever is raised while a video is read into UnreadableVideo: one bad file must not end a run."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise UnreadableVideo(path, first_line(error), is_temporary(error)) from error


def is_temporary(error: Exception) -> bool:
    """Whether the machine rather than the file's content is to blame for an error."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in TEMPORARY)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without error number and path; the error's type if it has no message."""
    if isinstance(error, AttributeError | TypeError | KeyError | IndexError):
        return f"{type(error).__name__}: {error}".splitlines()[0]  # of the library that reads it
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
