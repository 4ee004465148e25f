"""Frames out of video files and images, behind one small interface."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from mvd.data.video.errors import UnreadableImage, UnreadableVideo, first_line
from mvd.data.video.packets import PacketVideo


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
    """A video decoded by decord, as in the official release, on one thread.

    Its frames are the same as PacketVideo's, but for files that decord 0.6 goes wrong on without a word: open groups
    of pictures, edit lists, odd sizes, transport streams, missing timestamps and damaged frames.
    """

    def __init__(self, path: str) -> None:
        import decord  # brings an FFmpeg of its own, which only those who choose it need

        self._path = path
        self._errors = (decord.DECORDError, RuntimeError, OSError)
        try:
            self._reader = decord.VideoReader(path, num_threads=1)
        except self._errors as error:
            raise UnreadableVideo(path, first_line(error)) from error
        if len(self._reader) == 0:
            raise UnreadableVideo(path, "it holds no frames")

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """See Video."""
        wanted, places = np.unique(indices, return_inverse=True)
        try:
            decoded = self._reader.get_batch(wanted).asnumpy()
        except self._errors as error:
            raise UnreadableVideo(self._path, first_line(error)) from error
        if len(decoded) != len(wanted):
            raise UnreadableVideo(self._path, f"{len(decoded)} frames came back where {len(wanted)} were asked for")
        return decoded[places]


READERS: dict[str, Callable[[str], Video]] = {"pyav": PacketVideo, "decord": DecordVideo}


def open_video(path: str, reader: str = "pyav") -> Video:
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
        raise UnreadableImage(path, first_line(error)) from error
