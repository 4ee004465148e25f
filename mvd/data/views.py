"""Test views of a video: temporal clips x spatial crops, all cut from one decoding."""

from collections.abc import Container
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mvd.config import ConfigError, Sampling
from mvd.data.annotations import Entry
from mvd.data.loader import start_worker
from mvd.data.reader import Unreadable, Video, open_video
from mvd.data.sampling import dense_test_indices, segment_test_indices
from mvd.data.stalls import ReadLimit
from mvd.sizes import ClipShape


class Views(NamedTuple):
    """Which views of a video are taken: temporal clips, spatial crops of each, their sampling and shape."""

    sampling: Sampling
    clips: int
    crops: int = 3
    stride: int = 4
    clip: ClipShape = ClipShape()


def cut_views(video: Video, views: Views) -> torch.Tensor:
    """Decodes the frames once and cuts all views, clip by clip and crop by crop: uint8 (views, 3, T, S, S).

    Frames are resized to a short side of S with OpenCV's bilinear filter; crops are spread evenly along the longer
    side, a single one is taken from the middle (QUIRKS 7, 8).

    Raises:
        UnreadableVideo: a frame cannot be decoded.
    """
    if views.sampling == "dense":
        clips = dense_test_indices(len(video), views.clips, views.clip.frames, views.stride)
    elif views.sampling == "segment":
        clips = segment_test_indices(len(video), views.clips, views.clip.frames)
    else:
        raise ConfigError(f'sampling is {views.sampling!r}; use "dense" or "segment"')
    wanted, places = np.unique(clips, return_inverse=True)
    frames = _resize_short_side(video.frames(wanted), views.clip.image_size)
    crops = _spread_crops(frames, views.crops)
    cut = np.stack([crop[of_clip].transpose(3, 0, 1, 2) for of_clip in places.reshape(clips.shape) for crop in crops])
    return torch.from_numpy(cut)


def _resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    height, width = frames.shape[1:3]
    if min(height, width) == size:
        return frames
    target = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    return np.stack([cv2.resize(frame, target, interpolation=cv2.INTER_LINEAR) for frame in frames])


def _spread_crops(frames: np.ndarray, crops: int) -> list[np.ndarray]:
    """Square crops, each (T, S, S, 3), of frames whose short side is S."""
    height, width = frames.shape[1:3]
    size, free = min(height, width), abs(height - width)
    starts = [free // 2] if crops == 1 else [int(i * free / (crops - 1)) for i in range(crops)]
    if height > width:
        return [frames[:, start : start + size] for start in starts]
    return [frames[:, :, start : start + size] for start in starts]


class ViewDataset(Dataset[dict[str, Any]]):
    """The views of every video of a list. A video that cannot be read is flagged, never replaced."""

    limit = ReadLimit()

    def __init__(self, entries: list[Entry], views: Views, reader: str = "decord") -> None:
        self.entries = entries
        self.views = views
        self.reader = reader

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        try:
            with self.limit.reading(entry.path):
                views = cut_views(open_video(entry.path, self.reader), self.views)
        except Unreadable as error:
            return {"index": index, "label": entry.label, "unreadable": error.reason}
        return {"index": index, "label": entry.label, "views": views}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of readable videos, and the index and the reason of each unreadable one.

        {"views": uint8 (N, V, 3, T, S, S), "labels": (N,), "indices": (N,), "unreadable": {index: reason}}; "views"
        is absent where no video of the batch is readable.
        """
        good = [item for item in items if "views" in item]
        batch: dict[str, Any] = {
            "labels": torch.tensor([item["label"] for item in good], dtype=torch.int64),
            "indices": torch.tensor([item["index"] for item in good], dtype=torch.int64),
            "unreadable": {item["index"]: item["unreadable"] for item in items if "unreadable" in item},
        }
        if good:
            batch["views"] = torch.stack([item["views"] for item in good])
        return batch


def view_loader(
    dataset: ViewDataset,
    rank: int,
    world_size: int,
    videos: int = 1,
    workers: int = 0,
    done: Container[int] = (),
) -> DataLoader[dict[str, Any]]:
    """Loads this rank's share of the videos, every world_size-th one but those `done`, each once, `videos` a batch."""
    return DataLoader(
        dataset,
        batch_size=videos,
        sampler=[index for index in range(rank, len(dataset), world_size) if index not in done],
        num_workers=workers,
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else starting it takes a draw from the global state that drop path uses
    )
