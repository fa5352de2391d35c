"""Has a model lost so much that any class can be reached in it? Then no locator names one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples that `logits` [N, K] class as `labels` [N]."""
    return float((logits.argmax(1) == labels).double().mean())


def prediction_excess(logits: Tensor, labels: Tensor) -> float:
    """Share of samples by which the most over-predicted class is predicted more often than it occurs."""
    classes = logits.shape[1]
    predicted = logits.argmax(1).bincount(minlength=classes)
    return float((predicted - labels.bincount(minlength=classes)).max() / len(labels))
