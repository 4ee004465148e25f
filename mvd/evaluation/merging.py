"""Merges the logits of a video's views into probabilities, and computes the accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

VideoId = int | str
Array = NDArray[Any]


class Merged(NamedTuple):
    """Per-video probabilities (videos, classes), in the order of the sorted video ids, and accuracies in percent."""

    probabilities: Array
    top1: float
    top5: float


def merge_views(
    logits: Array | torch.Tensor,
    video_ids: Sequence[VideoId] | Array,
    view_ids: Sequence[VideoId] | Array,
    labels: Mapping[VideoId, int] | Sequence[int] | Array | torch.Tensor,
) -> Merged:
    """Softmax of each view, mean over a video's views, then top-1 and top-5 over the videos (QUIRKS 16).

    logits: (V, C). video_ids, view_ids: the video and view of each row, (V,). Of rows with the same video and view,
    only the first counts. labels: a mapping from video id, one label per view (V,), or one label per video in the
    order of the sorted ids.

    Raises:
        ValueError: lengths that do not match, logits that are not finite, or a video without a unique label.
    """
    scores = np.asarray(logits, dtype=np.float64)
    ids, video = np.unique(np.asarray(video_ids), return_inverse=True)
    view_names, view = np.unique(np.asarray(view_ids), return_inverse=True)
    if scores.ndim != 2 or not len(scores) == len(video) == len(view) > 0:
        given = f"{scores.shape} logits, {len(video)} video ids and {len(view)} view ids"
        raise ValueError(f"logits, video_ids and view_ids must have one row per view, got {given}")
    if not np.isfinite(scores).all():
        worst = ids[video[~np.isfinite(scores).all(axis=1)][0]].item()
        raise ValueError(f"the logits of video {worst!r} are not finite; check the weights and the precision")
    _, first = np.unique(video * len(view_names) + view, return_index=True)
    truth = _labels_of(ids, video, labels)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    sums = np.zeros((len(ids), scores.shape[1]))
    np.add.at(sums, video[first], shares[first])
    probabilities = sums / np.bincount(video[first])[:, None]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    hits = best == truth[:, None]
    return Merged(probabilities, 100 * float(hits[:, 0].mean()), 100 * float(hits.any(axis=1).mean()))


def _labels_of(ids: Array, video: Array, labels: Mapping[VideoId, int] | Sequence[int] | Array | torch.Tensor) -> Array:
    """One label for each of the sorted ids; video: each view's index among them."""
    if isinstance(labels, Mapping):
        missing = [name for name in ids.tolist() if name not in labels]
        if missing:
            raise ValueError(f"video {missing[0]!r} has no label; give one for each of the {len(ids)} videos")
        return np.array([labels[name] for name in ids.tolist()])
    given = np.asarray(labels)
    if len(given) == len(video):
        _, first = np.unique(video, return_index=True)
        unclear = np.flatnonzero(given != given[first][video])
        if len(unclear):
            raise ValueError(f"the views of video {ids[video[unclear[0]]]!r} have different labels; give it one")
        return given[first]
    if len(given) != len(ids):
        raise ValueError(
            f"{len(given)} labels for {len(ids)} videos of {len(video)} views; give one per video or per view"
        )
    return given
