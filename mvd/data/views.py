"""Test views of a video: temporal clips x spatial crops, all cut from frames that are decoded once."""

from collections.abc import Container
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mvd.config import ConfigError, Sampling
from mvd.config.sizes import ClipShape
from mvd.data.annotations import Entry
from mvd.data.clip.crops import Box, cut, to_clip
from mvd.data.clip.frame_sampling import dense_test_indices, segment_test_indices
from mvd.data.loader import start_worker, worker_count
from mvd.data.packed import PackedEntries
from mvd.data.started_loader import StartedLoader
from mvd.data.transport import Inline, SharedPixels
from mvd.data.video.errors import Unreadable
from mvd.data.video.packet_index import PacketIndex
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.video.reader import Video, open_video
from mvd.data.workers import LOADER_START_METHOD


class Views(NamedTuple):
    """Settings of the views: temporal clips, spatial crops of each clip, frame sampling and clip shape."""

    sampling: Sampling
    clips: int
    crops: int = 3
    stride: int = 4
    clip: ClipShape = ClipShape()


class DecodedViews(NamedTuple):
    """The frames that views are cut from, each stored once, since views share most of their pixels.

    frames: uint8 (3, F, h, w), cropped to the area that the views cover.
    places: int64 (clips, T), the indices into `frames` that form each clip.
    starts: where each crop starts along the longer side, in pixels.
    """

    frames: torch.Tensor
    places: torch.Tensor
    starts: list[int]

    def cut(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Cut the views on a device, in the order of clips, then crops: uint8 (clips x crops, 3, T, S, S)."""
        frames = self.frames.to(device, non_blocking=True)
        height, width = frames.shape[2:]
        listed = frames.index_select(1, self.places.flatten().to(device, non_blocking=True))
        along = 2 if height > width else 3
        crops = torch.stack([listed.narrow(along, start, min(height, width)) for start in self.starts])
        clips, length = self.places.shape
        by_clip = crops.view(*crops.shape[:2], clips, length, *crops.shape[3:])
        return by_clip.permute(2, 0, 1, 3, 4, 5).flatten(0, 1)


def decode_views(video: Video, views: Views) -> DecodedViews:
    """Decode each frame of the views once and resize its short side to S with OpenCV's bilinear filter.

    Crops are spread evenly along the longer side; a single crop is the central one (QUIRKS 7, 8).

    Raises:
        UnreadableVideo: a frame cannot be decoded.
        ConfigError: an unknown sampling.
    """
    if views.sampling == "dense":
        clips = dense_test_indices(len(video), views.clips, views.clip.frames, views.stride)
    elif views.sampling == "segment":
        clips = segment_test_indices(len(video), views.clips, views.clip.frames)
    else:
        raise ConfigError(f'sampling must be "dense" or "segment", got {views.sampling!r}')
    wanted, inverse = np.unique(clips, return_inverse=True)
    frames = [_resize_short_side(frame, views.clip.image_size) for frame in video.pictures(wanted)]
    height, width = frames[0].shape[:2]
    side, free = min(height, width), abs(height - width)
    starts = [int(i * free / (views.crops - 1)) for i in range(views.crops)] if views.crops > 1 else [free // 2]
    length = starts[-1] - starts[0] + side
    covered = Box(starts[0], 0, length, width) if height > width else Box(0, starts[0], height, length)
    places = torch.from_numpy(inverse.reshape(clips.shape))
    return DecodedViews(to_clip(cut(frames, covered)), places, [start - starts[0] for start in starts])


def _resize_short_side(frame: np.ndarray, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    if min(height, width) == size:
        return frame
    target = (size, int(size * height / width)) if width < height else (int(size * width / height), size)
    return cv2.resize(frame, target, interpolation=cv2.INTER_LINEAR)


class ViewDataset(Dataset[dict[str, Any]]):
    """The decoded views of each video of a list. A video that is unreadable twice is flagged, never replaced."""

    timeout = ReadTimeout()
    index: PacketIndex | None = None

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
                    views = decode_views(open_video(entry.path, self.reader, self.index), self.views)
                return {"index": index, "label": entry.label, "views": views}
            except Unreadable as error:
                reason = error.reason
        return {"index": index, "label": entry.label, "unreadable": reason}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of the readable videos, with the index of each unreadable one and the reason.

        {"views": N DecodedViews, "labels": (N,), "indices": (N,), "unreadable": {index: reason}}.
        """
        good = [item for item in items if "views" in item]
        batch = {
            "views": [item["views"] for item in good],
            "labels": torch.tensor([item["label"] for item in good], dtype=torch.int64),
            "indices": torch.tensor([item["index"] for item in good], dtype=torch.int64),
            "unreadable": {item["index"]: item["unreadable"] for item in items if "unreadable" in item},
        }
        return batch if get_worker_info() is None else _to_be_sent(batch)


def _to_be_sent(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch once it has arrived in another process (mvd.data.transport)."""
    sent = [(SharedPixels.copy_of(views.frames), Inline(views.places), views.starts) for views in batch["views"]]
    views = [DecodedViews(*fields) for fields in sent]  # type: ignore[arg-type]
    return {**batch, "views": views, "labels": Inline(batch["labels"]), "indices": Inline(batch["indices"])}


def view_loader(
    dataset: ViewDataset,
    rank: int,
    world_size: int,
    videos: int = 1,
    workers: int = 0,
    done: Container[int] = (),
) -> DataLoader[dict[str, Any]]:
    """Loads this rank's share of the videos, every world_size-th one, each once, in batches of `videos`.

    Args:
        done: indices to skip.
    """
    processes = worker_count(workers)
    return StartedLoader(
        dataset,
        batch_size=videos,
        sampler=[index for index in range(rank, len(dataset), world_size) if index not in done],
        num_workers=processes,
        multiprocessing_context=LOADER_START_METHOD if processes else None,
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the default draws from the global state, which drop path uses
    )
