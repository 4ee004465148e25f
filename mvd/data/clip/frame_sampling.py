"""Frame sampling: the 0-based int64 frame indices of a clip, as the official release chooses them.

`length` is the number of frames of the video; `frames` and `stride` are those of the clip; `rng` is a numpy
Generator. All functions raise ValueError if `length` is less than 1.
"""

from itertools import pairwise

import numpy as np


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"a video must have at least one frame, got {length}; remove it from the list")


def pretrain_indices(length: int, rng: np.random.Generator, frames: int = 16, stride: int = 4) -> np.ndarray:
    """Pre-training: every `stride`-th frame from a uniform start, (frames,).

    If the video is shorter than the clip, start at 0 and repeat the last frame reached, which is never the video's
    last one (QUIRKS 30).
    """
    _check_length(length)
    span = frames * stride
    offsets = np.arange(frames, dtype=np.int64) * stride
    if length >= span:
        return offsets + rng.integers(length - span + 1)
    reachable = max(length - 2, 0) // stride * stride
    return np.minimum(offsets, reachable)


def dense_train_indices(length: int, rng: np.random.Generator, frames: int = 16, stride: int = 4) -> np.ndarray:
    """Dense fine-tuning: `frames` points over a window of frames x stride, both ends included, (frames,).

    The effective stride is therefore 64/15 for the rows, and the last frame of a longer video is never used
    (QUIRKS 5). A shorter video gives length // stride points over its whole length, then repeats its last frame.
    """
    _check_length(length)
    span = frames * stride
    if length <= span:
        points = np.linspace(0, length, num=length // stride)
        padded = np.concatenate([points, np.full(frames - len(points), length)])
        points = np.clip(padded, 0, length - 1)
    else:
        end = int(rng.integers(span, length))
        points = np.clip(np.linspace(end - span, end, num=frames), end - span, end - 1)
    return points.astype(np.int64)


def segment_train_indices(length: int, rng: np.random.Generator, frames: int = 16) -> np.ndarray:
    """Uniform fine-tuning: one random frame of each of `frames` equal segments, (frames,). Segments share borders."""
    _check_length(length)
    borders = _segment_borders(length, frames)
    return np.array([rng.integers(low, high + 1) for low, high in pairwise(borders)], np.int64)


def dense_test_indices(length: int, clips: int = 5, frames: int = 16, stride: int = 4) -> np.ndarray:
    """Dense testing: evenly spread windows in the list of every `stride`-th frame, (clips, frames).

    A list shorter than a window is padded with its last frame (QUIRKS 7). A single clip is the middle one.
    """
    _check_length(length)
    listed = np.arange(0, length, stride, dtype=np.int64)
    listed = np.pad(listed, (0, max(frames - len(listed), 0)), mode="edge")
    free = len(listed) - frames
    starts = [free // 2] if clips == 1 else [int(i * free / (clips - 1)) for i in range(clips)]
    return np.stack([listed[start : start + frames] for start in starts])


def segment_test_indices(length: int, clips: int = 2, frames: int = 16) -> np.ndarray:
    """Uniform testing: the middles of clips x frames segments, assigned to the clips in turn, (clips, frames)."""
    _check_length(length)
    borders = _segment_borders(length, clips * frames)
    middles = (borders[:-1] + borders[1:]) // 2
    return np.stack([middles[clip::clips] for clip in range(clips)])


def _segment_borders(length: int, segments: int) -> np.ndarray:
    return np.round(np.arange(segments + 1) * ((length - 1) / segments)).astype(np.int64)
