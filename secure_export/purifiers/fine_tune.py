"""Plain fine-tuning on clean samples: the baseline that every purifier must beat."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers._work import FineTuned, Work


class FineTune(FineTuned):
    """Cross-entropy on all parameters with a cosine schedule (BackdoorBench's FT)."""

    epochs: int = Field(30, ge=1, description="passes over fit; BackdoorBench takes 100 over 2,500 samples")
    batch_size: int = Field(
        64, ge=2, description="BackdoorBench's 256 leaves two steps a pass over 500 samples"
    )

    def remove(self, work: Work) -> None:
        """Fine-tune; the target class only names the margin in the history."""
        self.tune(work, lambda x, y: F.cross_entropy(work.model(x), y), phase="fine-tune")
