"""The test views of one video file, for use without a stage."""

from pathlib import Path

import torch

from mvd.config import Sampling
from mvd.config.sizes import ClipShape
from mvd.data.on_device import normalise
from mvd.data.video.reader import open_video
from mvd.data.views import Views, decode_views

CLIP_OF_THE_ROWS = ClipShape()


def test_views(
    path: str | Path,
    sampling: Sampling,
    clips: int,
    crops: int = 3,
    *,
    stride: int = 4,
    clip: ClipShape = CLIP_OF_THE_ROWS,
    reader: str = "pyav",
) -> torch.Tensor:
    """The test views of a video, clip by clip and crop by crop: float32 (clips x crops, 3, T, S, S), normalised.

    Raises:
        UnreadableVideo: the file cannot be decoded.
    """
    views = decode_views(open_video(str(path), reader), Views(sampling, clips, crops, stride, clip))
    return normalise(views.cut())


test_views.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test to pytest
