"""Reads frames of video files, and images."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from mvd.data.video.errors import UnreadableImage, UnreadableVideo, first_line, is_temporary, unreadable
from mvd.data.video.packet_index import PacketIndex
from mvd.data.video.packets import PacketVideo


class Video(Protocol):
    """An open video."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def pictures(self, indices: np.ndarray) -> list[np.ndarray]:
        """The frames of these numbers, 0-based and in this order, repeats allowed: N arrays uint8 (H, W, 3), RGB.

        Raises:
            UnreadableVideo: a frame is damaged or missing, or their sizes differ.
            IndexError: a number is negative, or not smaller than the number of frames.
        """
        ...

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """The same as one array, uint8 (N, H, W, 3), for which the frames are copied."""
        ...


class DecordVideo:
    """A video decoded by decord, as in the official release, on one thread.

    Its frames are the same as PacketVideo's, except for files that decord 0.6 silently reads wrong: open GOPs, edit
    lists, odd sizes, transport streams, missing or wrong timestamps, truncated files and damaged frames.
    """

    def __init__(self, path: str) -> None:
        import decord  # loads an FFmpeg of its own, which only users of this reader need

        self._path = path
        with unreadable(path):
            self._reader = decord.VideoReader(path, num_threads=1)
        if len(self._reader) == 0:
            raise UnreadableVideo(path, "it holds no frames")

    def __len__(self) -> int:
        return len(self._reader)

    def pictures(self, indices: np.ndarray) -> list[np.ndarray]:
        """See Video."""
        return list(self.frames(indices))

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """See Video."""
        wanted, places = np.unique(indices, return_inverse=True)
        with unreadable(self._path):
            decoded: np.ndarray = self._reader.get_batch(wanted).asnumpy()
        if len(decoded) != len(wanted):
            raise UnreadableVideo(self._path, f"decord returned {len(decoded)} of {len(wanted)} frames")
        return decoded[places]


READERS: dict[str, Callable[[str], Video]] = {"pyav": PacketVideo, "decord": DecordVideo}


def open_video(path: str, reader: str = "pyav", index: PacketIndex | None = None) -> Video:
    """Opens a video with the reader of that name; PyAV with the data set's packet index where that has the video.

    Raises:
        UnreadableVideo: the file is missing, empty, truncated, encrypted, no video, or there is no decoder for it.
    """
    indexed = index.open(path) if index is not None and reader == "pyav" else None
    return READERS[reader](path) if indexed is None else indexed


def read_image(path: str) -> np.ndarray:
    """A decoded image, uint8 (H, W, 3), RGB.

    Raises:
        UnreadableImage: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage(path, first_line(error), is_temporary(error)) from error
