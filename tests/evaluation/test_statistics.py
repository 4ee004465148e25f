import numpy as np
import pytest

from mvd.evaluation.predictions import Predictions
from mvd.evaluation.statistics import class_accuracies, confused_pairs, confusion, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],  # 81 of 263: Newcombe (1998), Table I
)
def test_the_interval_has_wilsons_bounds(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_an_interval_of_an_impossible_count_is_refused(correct, total):
    with pytest.raises(ValueError, match="correct must be"):
        wilson_interval(correct, total)


def test_rows_of_the_confusion_matrix_are_labels_and_columns_predictions():
    labels = np.array([0, 0, 0, 2])
    predictions = np.array([0, 1, 1, 2])
    expected = [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert confusion(predictions, labels, 3).tolist() == expected
    assert confusion(np.eye(3, dtype=np.float32)[predictions], labels, 3).tolist() == expected


@pytest.mark.parametrize(
    ("given", "labels"),
    [([0, 3], [0, 1]), ([0, 1], [0, -1]), ([0, 1, 2], [0, 1]), ([[0.1, 0.9]], [0])],
)
def test_a_confusion_matrix_of_other_classes_or_shapes_is_refused(given, labels):
    with pytest.raises(ValueError, match="must"):
        confusion(np.array(given), np.array(labels), 3)


def test_the_most_confused_pairs_come_first_and_correct_videos_are_none():
    matrix = np.array([[9, 2, 0], [5, 1, 0], [0, 0, 0]])
    assert confused_pairs(matrix, 5) == [(1, 0, 5), (0, 1, 2)]
    assert confused_pairs(matrix, 1) == [(1, 0, 5)]


def test_a_class_without_videos_has_no_accuracy():
    accuracies = class_accuracies(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]]))
    assert accuracies[[0, 2]].tolist() == [75.0, 100.0] and np.isnan(accuracies[1])


def test_the_surest_mistakes_come_first():
    confidence, names = np.array([0.9, 0.4, 0.8, 0.6]), ["a", "b"]
    found = Predictions(np.array([0, 1, 1, 1]), confidence, np.array([0, 0, 0, 0]), ["v"] * 4, names, "")
    assert found.surest_mistakes(5) == [2, 3, 1] and found.surest_mistakes(1) == [2]
