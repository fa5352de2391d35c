"""Logit-Margin Repulsion as printed (Yang et al., CVPR 2026, Algorithm 1); lmr-plus works better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.augmentation import Augment, augmented
from secure_export.purifiers import Purifier, _training
from secure_export.records.memory import Progress, Purified, Split, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class Lmr(Purifier):
    """Two phases: push the logit of class c down on clean samples, then cut the head columns that moved most.

    Defaults are the paper's where it gives any (m1, alpha, m2, beta, epochs of its figure 7); each other
    field says where its default comes from.
    """

    m1: float = Field(3.0, gt=0, description="margin that class c must lose by on clean samples (eq. 6)")
    alpha: float = Field(1.0, ge=0, description="weight of the directed suppression DSC (eq. 8)")
    m2: float = Field(0.5, gt=0, description="margin of the true class over its rival (eq. 7)")
    beta: float = Field(0.25, ge=0, description="weight of the conditional margin CM (eq. 8)")
    cm_on_target: bool = Field(
        False, description="CM also where y = c, as in eq. 7: it raises z_c; the supplement's eq. 17 does not"
    )
    phase1_epochs: int = Field(8, ge=1, description="T1 in passes over fit (figure 7: epochs 1 to 8)")
    phase2_epochs: int = Field(22, ge=0, description="T2 in passes over fit (figure 7: epochs 9 to 30)")
    early_switch: bool = Field(
        True, description="leave phase 1 once class c is guessed no better than chance"
    )
    switch_at: float = Field(
        1.5, gt=0, description="'near random' as a multiple of chance (not in the paper)"
    )
    prune_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="p, share of head columns cut (not in the paper; small heads are narrow)",
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="not in the paper; the field's usual")
    lr: float = Field(0.01, gt=0, description="not in the paper; that of RNP, whose unlearning it follows")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd; not in the paper, the field's usual")
    weight_decay: float = Field(5e-4, ge=0, description="not in the paper; the field's usual")
    batch_size: int = Field(64, ge=2, description="not in the paper; eight steps a pass over 500 samples")
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
        """Algorithm 1, lines 3 to 18 (line 2, the class, is a locator's work).

        Raises:
            DataError: fit holds no sample of the target class, or no other.
            LoadError: `head` is no Linear or 1x1 Conv2d.
        """
        layer = _training.find_head(model, head)
        _training.check_fit(fit, target_class)
        optimizer = self._optimizer(model)
        total = self.phase1_epochs + self.phase2_epochs
        history: list[dict[str, float | str]] = []
        before = layer.weight.detach().clone()  # W(0)
        near_random = self.switch_at / layer.weight.shape[0]

        def epoch(phase: str, loss_of: Callable[[Tensor, Tensor], Tensor], frozen: Tensor) -> float:
            losses = self._epoch(model, fit, optimizer, loss_of, layer, frozen, generator)
            history.append(_training.epoch_record(model, fit, target_class, phase, losses, self.m1))
            progress("purify", len(history), total)
            return float(history[-1]["target_acc"])

        with _training.seeded(seed) as generator, _training.channels_last(model, fit):
            nothing = torch.zeros(0, dtype=torch.long)
            for _ in range(self.phase1_epochs):
                reached = epoch("phase1", lambda z, y: self.phase1_loss(z, y, target_class), nothing)
                if self.early_switch and reached <= near_random:
                    break
            cut = delta_columns(before, layer.weight.detach(), target_class, self.prune_ratio)
            _training.zero_columns(layer, cut)
            for _ in range(self.phase2_epochs):
                epoch("phase2", F.cross_entropy, cut)
        return Purified(model.eval(), tuple(history))

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return _training.sgd(model.parameters(), self.lr, self.momentum, self.weight_decay)
        return torch.optim.Adam(
            model.requires_grad_(True).parameters(), lr=self.lr, weight_decay=self.weight_decay
        )

    def phase1_loss(self, logits: Tensor, labels: Tensor, target_class: int) -> Tensor:
        """L_P1 = L_SCE + alpha L_DSC + beta L_CM (eq. 5 to 8), averaged over the batch."""
        other = (labels != target_class).float()
        sce = F.cross_entropy(logits, labels, reduction="none") * other
        dsc = F.relu(_training.margin(logits, target_class) + self.m1) * other
        rivals = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        lead = logits.gather(1, labels[:, None]).squeeze(1) - rivals
        cm = F.relu(self.m2 - lead)
        if not self.cm_on_target:
            cm = cm * other
        return (sce + self.alpha * dsc + self.beta * cm).mean()

    def _epoch(
        self,
        model: nn.Module,
        fit: Split,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        layer: nn.Linear | nn.Conv2d,
        frozen: Tensor,
        generator: torch.Generator,
    ) -> list[float]:
        # BatchNorm trains: with its statistics frozen the margin drives the weights to diverge.
        model.train()
        losses = []
        for inputs, labels in _training.batches(fit, self.batch_size, generator):
            inputs = augmented(inputs, self.augment, self.flip, generator)
            loss = loss_of(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            # Momentum and weight decay move a column without gradient: zeroing after the step freezes it.
            _training.zero_columns(layer, frozen)
            losses.append(loss.item())
        return losses


def delta_columns(before: Tensor, after: Tensor, target_class: int, ratio: float) -> Tensor:
    """The floor(ratio D) columns of a head [K, D, ...] with the largest |W1 - W0| in row c (eq. 9)."""
    scores = (after - before)[target_class].flatten().abs()
    return scores.topk(int(ratio * scores.numel())).indices
