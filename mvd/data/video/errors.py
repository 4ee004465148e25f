"""What is raised for a file that cannot be decoded."""


class Unreadable(RuntimeError):
    """A file that cannot be decoded: its path and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error can be sent between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be read: {self.reason}"


class UnreadableVideo(Unreadable):
    """A video that cannot be opened or does not give the frames it promises."""


class UnreadableImage(Unreadable):
    """An image that cannot be decoded."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, without numbers and paths; its name where it has none."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
