"""What a finished test predicted for each video, from its logits and the list of test videos."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvd.config import ConfigError, dataset_of
from mvd.data.annotations import Entry, load_split
from mvd.data.class_names import class_names_of
from mvd.evaluation.logits import Logits, read_logits
from mvd.evaluation.merging import merge_views
from mvd.evaluation.statistics import confusion
from mvd.stage import Stage


class Predictions(NamedTuple):
    """The predictions for the N videos that could be read.

    predicted, labels: classes, (N,). confidence: the mean probability of the predicted class over the views, (N,).
    videos: paths in the list of test videos or, if that is gone or has changed, `video <line>`; (N,).
    names: class names; `class <number>` if they are unknown. note: what is missing, in one sentence, or empty.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    labels: NDArray[np.int64]
    videos: list[str]
    names: list[str]
    note: str

    @property
    def matrix(self) -> NDArray[np.int64]:
        """The confusion matrix, (classes, classes)."""
        return confusion(self.predicted, self.labels, len(self.names))

    def surest_mistakes(self, most: int) -> list[int]:
        """Up to `most` wrongly predicted videos as indices, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return [int(index) for index in wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]]


def read_predictions(stage: Stage) -> Predictions:
    """The predictions of a test, merged over its views as for its accuracy.

    Raises:
        ConfigError: there are no logits, or they are damaged.
    """
    folder = stage.files.path
    files = sorted([*folder.glob("logits/*.npz"), *folder.glob("shards/*/logits/*.npz")])
    entries, note = _entries(stage)
    parts = [part for path in files if (part := read_logits(path, entries)) and len(part.indices)]
    if not parts and files:
        entries, note = None, f"{folder}: the list of test videos has changed since the test, so videos have no names"
        parts = [part for path in files if (part := read_logits(path, None)) and len(part.indices)]
    if not parts:
        raise ConfigError(f"{folder / 'logits'} has no logits; details of single videos need them, so test again")
    predicted, confidence, indices, labels = (
        np.concatenate(arrays) for arrays in zip(*map(_merge, parts), strict=True)
    )
    indices, first = np.unique(
        indices, return_index=True
    )  # a file of an earlier attempt with more processes may remain
    names = stage.files.class_names() or class_names_of(stage.recipe, stage.execution.data)
    return Predictions(
        predicted[first],
        confidence[first],
        labels[first],
        [entries[index].path if entries else f"video {index + 1}" for index in indices.tolist()],
        names or [f"class {number}" for number in range(dataset_of(stage.recipe).classes)],
        note,
    )


def _entries(stage: Stage) -> tuple[list[Entry] | None, str]:
    data = stage.execution.data
    try:
        return (load_split(stage.recipe, data, "test") if data else None), ""
    except ConfigError as error:
        return None, f"{stage.id}: videos have no names, since {error}"


def _merge(part: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Predicted class, its probability, index and label of each video, (N,) each, by ascending index."""
    indices, first = np.unique(part.indices, return_index=True)
    views, classes = part.logits.shape[1:]
    numbers = np.tile(np.arange(views), len(part.indices))
    labels = dict(zip(part.indices.tolist(), part.labels.tolist(), strict=True))
    merged = merge_views(part.logits.reshape(-1, classes), part.indices.repeat(views), numbers, labels)
    best = merged.probabilities.argmax(axis=1)
    return best, merged.probabilities.max(axis=1), indices, part.labels[first]
