"""How the logits of a video's views become probabilities, and probabilities an accuracy."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

VideoId = int | str


class Merged(NamedTuple):
    """Per-video probabilities (videos, classes), in the order of the sorted video ids, and accuracies in percent."""

    probabilities: np.ndarray
    top1: float
    top5: float


def merge_views(
    logits: np.ndarray | torch.Tensor,
    video_ids: Sequence[VideoId] | np.ndarray,
    view_ids: Sequence[VideoId] | np.ndarray,
    labels: Mapping[VideoId, int] | Sequence[int] | np.ndarray | torch.Tensor,
) -> Merged:
    """Softmax of each view, mean over a video's views, then top-1 and top-5 over the videos (QUIRKS 16).

    logits (V, C); video_ids and view_ids (V,) say whose view each row is. A (video, view) that comes again counts
    once, its first row. labels: a mapping from video id, one label a view (V,), or one label a video in the order of
    the sorted ids.

    Raises:
        ValueError: lengths that do not match, logits that are not finite, or a video without one clear label.
    """
    scores = np.asarray(logits, dtype=np.float64)
    ids, video = np.unique(np.asarray(video_ids), return_inverse=True)
    view_names, view = np.unique(np.asarray(view_ids), return_inverse=True)
    if scores.ndim != 2 or not len(scores) == len(video) == len(view) > 0:
        shapes = f"{scores.shape} logits, {len(video)} video ids and {len(view)} view ids"
        raise ValueError(f"{shapes} do not go together; give one row and one id of each kind a view")
    if not np.isfinite(scores).all():
        worst = ids[video[~np.isfinite(scores).all(axis=1)][0]]
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


def _labels_of(
    ids: np.ndarray, video: np.ndarray, labels: Mapping[VideoId, int] | Sequence[int] | np.ndarray | torch.Tensor
) -> np.ndarray:
    """One label for each of the sorted ids; `video` holds each view's place among them."""
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
            raise ValueError(f"the views of video {ids[video[unclear[0]]]!r} carry different labels; give it one")
        return given[first]
    if len(given) != len(ids):
        raise ValueError(f"{len(given)} labels for {len(ids)} videos of {len(video)} views; give one a video or a view")
    return given
