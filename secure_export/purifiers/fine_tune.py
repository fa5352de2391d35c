"""Plain fine-tuning on clean samples: the baseline that every purifier must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import Purifier, _training
from secure_export.purifiers._training import Augment
from secure_export.records import Progress, Purified, Split, silent

if TYPE_CHECKING:
    from torch import nn


class FineTune(Purifier):
    """Cross-entropy on all parameters with a cosine schedule (BackdoorBench's FT)."""

    lr: float = Field(0.01, gt=0, description="initial learning rate; decays to 0 along a cosine")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    epochs: int = Field(30, ge=1, description="passes over fit; BackdoorBench takes 100 over 2,500 samples")
    batch_size: int = Field(
        64, ge=2, description="BackdoorBench's 256 leaves two steps a pass over 500 samples"
    )
    augment: Augment = Field("auto", description="crop and flip; auto: images of at least 24 pixels a side")
    flip: bool = Field(True, description="mirror images; false where mirroring changes the label (digits)")

    def purify(
        self,
        model: nn.Module,
        head: str,
        target_class: int,
        fit: Split,
        *,
        seed: int,
        progress: Progress = silent,
    ) -> Purified:
        """Fine-tune `model` on `fit`; `target_class` only names the margin in the history.

        Raises:
            DataError: fit holds no sample of the target class, or no other.
            LoadError: `head` is no Linear or 1x1 Conv2d.
        """
        _training.find_head(model, head)
        _training.check_fit(fit, target_class)
        optimizer = _training.sgd(model.parameters(), self.lr, self.momentum, self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        history = []
        with _training.seeded(seed) as generator, _training.channels_last(model, fit):
            for epoch in range(self.epochs):
                model.train()
                losses = []
                for inputs, labels in _training.batches(fit, self.batch_size, generator):
                    inputs = _training.augmented(inputs, self.augment, self.flip, generator)
                    loss = F.cross_entropy(model(inputs), labels)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    losses.append(loss.item())
                schedule.step()
                history.append(_training.epoch_record(model, fit, target_class, "fine-tune", losses, 0.0))
                progress("purify", epoch + 1, self.epochs)
        return Purified(model.eval(), tuple(history))
