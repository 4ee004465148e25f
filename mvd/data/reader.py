"""Frames out of video files and images, behind one small interface."""

from typing import Protocol

import decord
import numpy as np
from PIL import Image


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


class Video(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """The frames of those numbers, 0-based and in that order, repeats allowed: uint8 (N, H, W, 3), RGB.

        Raises:
            UnreadableVideo: the decoder fails or returns another number of frames.
        """
        ...


class DecordVideo:
    """A video decoded by decord on one thread: loader processes are the parallelism."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._reader = decord.VideoReader(path, num_threads=1)
        except (decord.DECORDError, RuntimeError, OSError) as error:
            raise UnreadableVideo(path, _first_line(error)) from error
        if len(self._reader) == 0:
            raise UnreadableVideo(path, "it holds no frames")

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        wanted, places = np.unique(indices, return_inverse=True)
        try:
            decoded = self._reader.get_batch(wanted).asnumpy()
        except (decord.DECORDError, RuntimeError, OSError) as error:
            raise UnreadableVideo(self._path, _first_line(error)) from error
        if len(decoded) != len(wanted):
            raise UnreadableVideo(self._path, f"{len(decoded)} frames came back where {len(wanted)} were asked for")
        return decoded[places]


READERS = {"decord": DecordVideo}


def open_video(path: str, reader: str = "decord") -> Video:
    """Opens a video with the reader of that name.

    Raises:
        UnreadableVideo: missing, empty, truncated or not a video.
    """
    return READERS[reader](path)


def read_image(path: str) -> np.ndarray:
    """A decoded image, uint8 (H, W, 3), RGB.

    Raises:
        UnreadableImage: missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage(path, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
