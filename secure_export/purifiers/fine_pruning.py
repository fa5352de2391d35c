"""Fine-Pruning (Liu et al., RAID 2018): cuts features that clean samples leave asleep, then fine-tunes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export import views
from secure_export.purifiers import _training
from secure_export.purifiers._work import FineTuned, Work

if TYPE_CHECKING:
    from torch import Tensor


class FinePruning(FineTuned):
    """Cuts the last features in the order of their mean activation on clean samples, then fine-tunes.

    A last convolution's channel is a feature of the head: zeroing the head's column is the same cut. Accuracy
    while cutting is that on fit, which is all that a defender has; BackdoorBench looks at the test set.
    """

    accuracy_loss: float = Field(
        0.1, ge=0, lt=1, description="relative loss of clean accuracy at which cutting stops"
    )
    step: float = Field(0.01, gt=0, le=1, description="share of the features cut at once")

    def remove(self, work: Work) -> None:
        """Cut, then cross-entropy with the cut columns held at zero."""
        cut = asleep(work, self.step, self.accuracy_loss)
        _training.zero_columns(work.head, cut)
        work.record("prune", [])

        self.tune(
            work,
            lambda x, y: F.cross_entropy(work.model(x), y),
            lambda: _training.zero_columns(work.head, cut),
            phase="fine-tune",
        )


@torch.no_grad()
def asleep(work: Work, step: float, accuracy_loss: float) -> Tensor:
    """Columns of the head, weakest mean activation first, as many as clean accuracy bears."""
    inputs, head = work.fit.floats(), work.head
    weight = head.weight.detach().clone()
    order = views.latents(work.model.eval(), head, inputs).mean(0).argsort()

    def accuracy(columns: Tensor) -> float:
        _training.zero_columns(head, columns)
        found = _training.logits_of(work.model, inputs).argmax(1)
        head.weight.copy_(weight)
        return float((found == work.fit.labels).float().mean())

    least = accuracy(order[:0]) * (1 - accuracy_loss)
    each = max(1, round(step * len(order)))
    kept = order[:0]
    for count in range(each, len(order), each):
        if accuracy(order[:count]) < least:
            break
        kept = order[:count]
    return kept
