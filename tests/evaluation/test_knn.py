import math

import pytest
import torch

from mvd.config import ConfigError
from mvd.data.annotations import Entry
from mvd.evaluation.knn import knn_top1
from mvd.evaluation.probe import choose_videos, evenly


def brute_force(train, train_labels, test, test_labels, k, temperature) -> float:
    """One video and one neighbour at a time."""
    correct = 0
    for vector, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        cosines = []
        for other, of in zip(train.tolist(), train_labels.tolist(), strict=True):
            product = sum(a * b for a, b in zip(vector, other, strict=True))
            cosines.append((product / math.hypot(*vector) / math.hypot(*other), of))
        votes: dict[int, float] = {}
        for cosine, of in sorted(cosines, reverse=True)[:k]:
            votes[of] = votes.get(of, 0) + math.exp(cosine / temperature)
        correct += max(votes, key=lambda of: votes[of]) == label
    return 100 * correct / len(test)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (1000, 0.07)])
def test_knn_equals_a_brute_force_reference(k, temperature):
    generator = torch.Generator().manual_seed(k)
    train_labels, test_labels = (
        torch.randint(5, (60,), generator=generator),
        torch.randint(5, (40,), generator=generator),
    )
    centres = torch.randn(5, 8, generator=generator)
    train = centres[train_labels] + 2 * torch.randn(60, 8, generator=generator)
    test = centres[test_labels] + 2 * torch.randn(40, 8, generator=generator)
    expected = brute_force(train, train_labels, test, test_labels, k, temperature)
    assert 10 < expected < 95
    assert knn_top1(train, train_labels, test, test_labels, k, temperature) == pytest.approx(expected, abs=1e-4)


def test_separable_features_give_100_percent_whatever_their_lengths():
    labels = torch.arange(200) % 4
    features = torch.eye(4)[labels] * torch.linspace(0.01, 100, 200)[:, None]
    assert knn_top1(features[:160], labels[:160], features[160:], labels[160:]) == 100


def test_random_labels_give_chance():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(4000, 16, generator=generator), torch.randint(8, (4000,), generator=generator)
    found = knn_top1(features[:2000], labels[:2000], features[2000:], labels[2000:])
    assert found == pytest.approx(100 / 8, abs=3)  # four standard deviations


def test_a_class_without_training_features_counts_as_wrong():
    assert knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7])) == 50


def test_videos_are_chosen_evenly_over_the_classes_and_the_same_each_time():
    entries = [Entry(f"/{number}", label) for number, label in enumerate([0] * 50 + [1] * 10 + [2] * 2)]
    chosen = evenly(entries, 12)
    assert [entry.path for entry in chosen][:6] == ["/0", "/50", "/60", "/1", "/51", "/61"]
    assert [sum(entry.label == label for entry in chosen) for label in range(3)] == [5, 5, 2]
    assert evenly(entries, 100) == sorted(evenly(entries, 100), key=evenly(entries, 62).index)


def test_the_probe_reads_at_most_a_quarter_of_the_training_list():
    entries = [Entry(f"/{number}", number % 8) for number in range(40_000)]
    assert [len(part) for part in choose_videos(entries[:400], entries[:90])] == [100, 90]
    assert [len(part) for part in choose_videos(entries[:40], entries[:400])] == [10, 10]
    assert [len(part) for part in choose_videos(entries, entries)] == [4096, 1024]


def test_labels_that_are_all_the_same_are_refused():
    with pytest.raises(ConfigError, match="same label"):
        choose_videos([Entry(f"/{number}", 0) for number in range(40)], [Entry("/a", 0)])
