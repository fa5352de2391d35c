"""A fresh head and fine-tuning: what is left of D3 without its distance, hinge and sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import _sphere
from secure_export.purifiers._work import FineTuned, Work


class RandomHead(FineTuned):
    """Draws the head's weights anew and fine-tunes everything: the ablation that D3 must beat.

    Protocol and draw are those of D3's official code, so that the two differ in nothing else.
    """

    weight_decay: float = Field(0.0, ge=0, description="as D3")

    def remove(self, work: Work) -> None:
        """Weights U(-0.5, 0.5) at the old norm, then cross-entropy; the bias stays."""
        weight = work.head.weight
        with torch.no_grad():
            weight.copy_(_sphere.fresh(weight, work.generator))
        self.tune(work, lambda x, y: F.cross_entropy(work.model(x), y), phase="fine-tune")
