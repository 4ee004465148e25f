"""Test views of a video: temporal clips x spatial crops, all cut from one decoding."""

from collections.abc import Container
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mvd.config import ConfigError, Sampling
from mvd.config.sizes import ClipShape
from mvd.data.annotations import Entry
from mvd.data.clip.frame_sampling import dense_test_indices, segment_test_indices
from mvd.data.datasets import to_clip
from mvd.data.loader import start_worker, worker_count
from mvd.data.packed import PackedEntries
from mvd.data.video.errors import Unreadable
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.video.reader import Video, open_video


class Views(NamedTuple):
    """Which views of a video are taken: temporal clips, spatial crops of each, their sampling and shape."""

    sampling: Sampling
    clips: int
    crops: int = 3
    stride: int = 4
    clip: ClipShape = ClipShape()


class DecodedViews(NamedTuple):
    """The frames that views are cut from, each once: views share most of their pixels.

    frames: uint8 (3, F, h, w), as much of them as the crops cover; places (clips, T): which of them make each clip;
    starts: where each crop begins along the longer side.
    """

    frames: torch.Tensor
    places: torch.Tensor
    starts: list[int]

    def cut(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Cuts the views on a device, clip by clip and crop by crop: uint8 (views, 3, T, S, S)."""
        frames = self.frames.to(device, non_blocking=True)
        height, width = frames.shape[2:]
        listed = frames.index_select(1, self.places.flatten().to(device, non_blocking=True))
        along = 2 if height > width else 3
        crops = torch.stack([listed.narrow(along, start, min(height, width)) for start in self.starts])
        return crops.unflatten(2, self.places.shape).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)


def decode_views(video: Video, views: Views) -> DecodedViews:
    """Decodes each frame of the views once and resizes it to a short side of S with OpenCV's bilinear filter.

    Crops are spread evenly along the longer side; a single one is taken from the middle (QUIRKS 7, 8).

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
    height, width = frames.shape[1:3]
    side, free = min(height, width), abs(height - width)
    starts = [int(i * free / (views.crops - 1)) for i in range(views.crops)] if views.crops > 1 else [free // 2]
    covered = slice(starts[0], starts[-1] + side)
    frames = frames[:, covered] if height > width else frames[:, :, covered]
    places = torch.from_numpy(places.reshape(clips.shape))
    return DecodedViews(to_clip(frames), places, [start - starts[0] for start in starts])


def _resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    height, width = frames.shape[1:3]
    if min(height, width) == size:
        return frames
    target = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    return np.stack([cv2.resize(frame, target, interpolation=cv2.INTER_LINEAR) for frame in frames])


class ViewDataset(Dataset[dict[str, Any]]):
    """Every video of a list, ready to cut its views. One that twice cannot be read is flagged, never replaced."""

    timeout = ReadTimeout()

    def __init__(self, entries: list[Entry], views: Views, reader: str = "pyav") -> None:
        self.entries = PackedEntries(entries)
        self.views = views
        self.reader = reader

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        reason = ""
        for _ in range(2):
            try:
                with self.timeout.reading(entry.path):
                    views = decode_views(open_video(entry.path, self.reader), self.views)
                return {"index": index, "label": entry.label, "views": views}
            except Unreadable as error:
                reason = error.reason
        return {"index": index, "label": entry.label, "unreadable": reason}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of readable videos, and the index and the reason of each unreadable one.

        {"views": N DecodedViews, "labels": (N,), "indices": (N,), "unreadable": {index: reason}}.
        """
        good = [item for item in items if "views" in item]
        return {
            "views": [item["views"] for item in good],
            "labels": torch.tensor([item["label"] for item in good], dtype=torch.int64),
            "indices": torch.tensor([item["index"] for item in good], dtype=torch.int64),
            "unreadable": {item["index"]: item["unreadable"] for item in items if "unreadable" in item},
        }


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
        num_workers=worker_count(workers),
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else starting it takes a draw from the global state that drop path uses
    )
