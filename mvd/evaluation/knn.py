"""Weighted k-nearest-neighbour classification of features (Wu et al., CVPR 2018, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_top1(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 in percent: each of the k most similar training features votes with exp(cosine / temperature).

    train: (N, D), test: (M, D). labels: (N,) and (M,) int64. With fewer than k training features, all of them vote.
    """
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    cosines, nearest = similarity.topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1, device=test.device)
    votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
    return 100 * float((votes.argmax(dim=1) == test_labels).float().mean())
