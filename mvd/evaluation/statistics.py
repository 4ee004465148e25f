"""Statistics of a test's predictions."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964  # the normal distribution's 97.5 % quantile: 95 % of it is within +- this many standard deviations


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, as fractions from 0 to 1: Wilson's score interval for a binomial proportion.

    Unlike the normal approximation, it stays within 0 and 1, and has a width when all or none are correct.

    Raises:
        ValueError: not 0 <= correct <= total with a total of at least 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"correct must be from 0 to total, and total at least 1, got {correct} of {total}")
    rate, spread = correct / total, Z_95**2 / total
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(
    logits_or_predictions: NDArray[np.floating] | NDArray[np.integer], labels: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """Confusion matrix (classes, classes): the number of samples of each label (row) predicted as each class (column).

    logits_or_predictions: class scores (N, classes), of which the largest is the prediction, or predictions (N,).
    labels: (N,).

    Raises:
        ValueError: the shapes do not fit, or a class is not from 0 to classes - 1.
    """
    given = np.asarray(logits_or_predictions)
    if given.ndim == 2 and given.shape[1] != classes:
        raise ValueError(f"logits must have {classes} columns, one per class, got {given.shape[1]}")
    predictions = given.argmax(axis=1) if given.ndim == 2 else given
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions must have the labels' shape (N,), got {predictions.shape} and {labels.shape}")
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.size and not (values.min() >= 0 and values.max() < classes):
            raise ValueError(f"{name} must be from 0 to {classes - 1}, got {values.min()} to {values.max()}")
    counts = np.bincount(labels.astype(np.int64) * classes + predictions.astype(np.int64), minlength=classes**2)
    return counts.reshape(classes, classes)


class Confused(NamedTuple):
    """`videos` videos of class `label` were predicted as class `predicted`."""

    label: int
    predicted: int
    videos: int


def confused_pairs(matrix: NDArray[np.int64], most: int) -> list[Confused]:
    """Up to `most` pairs of different classes of a confusion matrix (classes, classes), the most frequent first."""
    errors = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    return [
        Confused(label, predicted, int(errors[label, predicted]))
        for label, predicted in pairs
        if errors[label, predicted]
    ]


def class_accuracies(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Accuracy of each class in percent, (classes,), from a confusion matrix; NaN for a class without videos."""
    totals = matrix.sum(axis=1)
    return np.where(totals > 0, 100 * matrix.diagonal() / np.maximum(totals, 1), np.nan)
