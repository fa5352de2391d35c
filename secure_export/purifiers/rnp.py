"""Reconstructive Neuron Pruning (Li et al., ICML 2023): unlearn, recover, cut what does not come back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import _neurons, _training
from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Tensor, nn


class Rnp(Published):
    """Neurons that a network without its clean task does not need to get it back are the backdoor's.

    The paper chooses the threshold by ASR on triggered test samples, which a defender has not; the default is
    BackdoorBench's. The authors' code means to clip gradients and does so before there are any; here the
    clipping acts.
    """

    lr: float = Field(0.01, gt=0, description="of unlearning; a tenth after passes 10 and 20")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    unlearn_epochs: int = Field(20, ge=1, description="passes at most")
    unlearned_at: float = Field(0.2, ge=0, lt=1, description="accuracy on the pass at which unlearning stops")
    clip: float = Field(20.0, gt=0, description="largest gradient norm while unlearning")
    recover_lr: float = Field(0.2, gt=0, description="of the mask")
    recover_epochs: int = Field(20, ge=1)
    recover_weight: float = Field(0.2, gt=0, description="factor of the recovering loss")
    batch_size: int = Field(128, ge=2)
    threshold: float = Field(0.7, ge=0, lt=1, description="neurons whose mask is at most this are cut")

    def remove(self, work: Work) -> None:
        """Unlearn and recover a copy; cut the model as it came."""
        unlearned = copy.deepcopy(work.model)
        self._unlearn(work, unlearned)
        mask = self._recover(work, unlearned)
        _neurons.cut(work.model, {name: m <= self.threshold for name, m in mask.items()})
        work.record("prune", [])

    def _unlearn(self, work: Work, model: nn.Module) -> None:
        """Maximize cross-entropy over all weights."""
        optimizer = _training.sgd(model.parameters(), self.lr, self.momentum, self.weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20], 0.1)
        hits: list[float] = []

        def step(inputs: Tensor, labels: Tensor) -> float:
            logits = model(inputs)
            hits.append(float((logits.argmax(1) == labels).float().mean()))
            loss = -F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            return loss.item()

        model.train()
        for _ in work.passes("unlearn", self.unlearn_epochs, step, model):
            if sum(hits) / len(hits) <= self.unlearned_at:
                break
            hits.clear()
            schedule.step()

    def _recover(self, work: Work, model: nn.Module) -> dict[str, Tensor]:
        """A factor in [0, 1] a neuron that brings the clean task back."""
        model.requires_grad_(False).train()
        mask = _neurons.ones(model, _neurons.scaled_layers(model, work.head_name))
        optimizer = torch.optim.SGD(
            [m.requires_grad_(True) for m in mask.values()], self.recover_lr, self.momentum
        )

        def step(inputs: Tensor, labels: Tensor) -> float:
            loss = self.recover_weight * F.cross_entropy(_neurons.scaled(model, mask)(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for m in mask.values():
                    m.clamp_(0, 1)
            return loss.item()

        for _ in work.passes("recover", self.recover_epochs, step, model):
            pass
        return {name: m.detach() for name, m in mask.items()}
