"""Has a model lost so much that any class can be reached in it? Then no locator names one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from secure_export.locators import Locator
from secure_export.records.measured import COLLAPSED, EXCESS, FIT_ACC

if TYPE_CHECKING:
    from torch import Tensor


class SparesRuins(Locator):
    """A locator that names no class of a collapsed model."""

    min_acc: float = Field(
        0.5, ge=0, le=1, description="below this accuracy on fit the model counts as collapsed"
    )
    max_excess: float = Field(
        0.1,
        gt=0,
        le=1,
        description="so it does when one class is predicted this much more often than it occurs (share of "
        "samples): intact zoo models reach .02, masked ones that raised a false alarm .16 and .19",
    )

    def collapse(self, logits: Tensor, labels: Tensor) -> dict[str, float | bool]:
        """Evidence from `logits` [N, K] and `labels` [N]: accuracy, excess, and whether they are a ruin's."""
        acc = float((logits.argmax(1) == labels).double().mean())
        excess = prediction_excess(logits, labels)
        return {
            FIT_ACC: acc,
            EXCESS: excess,
            COLLAPSED: acc < self.min_acc or excess > self.max_excess,
        }


def prediction_excess(logits: Tensor, labels: Tensor) -> float:
    """Share of samples by which the most over-predicted class is predicted more often than it occurs."""
    classes = logits.shape[1]
    predicted = logits.argmax(1).bincount(minlength=classes)
    return float((predicted - labels.bincount(minlength=classes)).max() / len(labels))
