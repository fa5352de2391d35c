"""Shared Adversarial Unlearning (Wei et al., NeurIPS 2023): unlearns what fools both models alike."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Tensor, nn


class Sau(Published):
    """Unlearns per-sample perturbations under which model and poisoned reference err the same way.

    Inner: min beta_adv L_adv + beta_share L_share within L-infinity eps around each sample, in [0, 1],
    BatchNorm in eval mode. Outer: CE on clean samples, and on samples that fool the reference the probability
    of its wrong label is pushed down; BatchNorm trains on both together. Weights and constants are those of
    the official configuration.
    """

    epochs: int = Field(100, ge=1, description="passes over fit")
    lr: float = Field(1e-4, gt=0, description="Adam's; decays to 0 along a cosine")
    eps: float = Field(0.2, gt=0, le=1, description="largest change of a value, inputs in [0, 1]")
    steps: int = Field(5, ge=1, description="sign steps of the inner problem")
    step_size: float = Field(0.2, gt=0)
    beta_adv: float = Field(0.01, ge=0, description="inner weight of the adversarial loss")
    beta_share: float = Field(1.0, ge=0, description="inner weight of the divergence of the two answers")
    clean_weight: float = Field(1.0, ge=0, description="outer weight of clean cross-entropy")
    adv_weight: float = Field(0.0, ge=0, description="outer weight of cross-entropy on perturbed samples")
    shared_weight: float = Field(1.0, ge=0, description="outer weight of the shared risk")

    def remove(self, work: Work) -> None:
        """Search, then one Adam step on the clean and the perturbed batch together."""
        model = work.model
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)

        def step(inputs: Tensor, labels: Tensor) -> float:
            moved = self.shared(model.eval(), reference, inputs, labels)
            with torch.no_grad():
                wrong = reference(moved).argmax(1)
            logits, moved_logits = model.train()(torch.cat([inputs, moved])).chunk(2)
            loss = self.clean_weight * F.cross_entropy(logits, labels)
            loss = loss + self.adv_weight * F.cross_entropy(moved_logits, labels)
            loss = loss + self.shared_weight * shared_risk(moved_logits, wrong, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.item()

        for _ in work.passes("unlearn", self.epochs, step):
            schedule.step()

    def shared(self, model: nn.Module, reference: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs moved within eps to where both answer with the same wrong class."""
        moved = (inputs + self.eps).clamp(0, 1)
        for _ in range(self.steps):
            moved.requires_grad_(True)
            ours, theirs = model(moved), reference(moved)
            found = (ours.argmax(1) == theirs.argmax(1)) & (ours.argmax(1) != labels)
            if bool(found.all()):
                break
            adversarial = -(hard_loss(ours, labels) + hard_loss(theirs, labels)) / 2
            divergence = jensen_shannon(ours[~found], theirs[~found]).mean()
            loss = self.beta_adv * adversarial + self.beta_share * divergence
            (gradient,) = torch.autograd.grad(loss, moved)
            delta = moved.detach() - self.step_size * gradient.sign() - inputs
            moved = (inputs + delta.clamp(-self.eps, self.eps)).clamp(0, 1)
        return moved.detach()


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over samples that are still classified right; 0 when there are none."""
    right = logits.argmax(1) == labels
    return F.cross_entropy(logits[right], labels[right]) if bool(right.any()) else logits.sum() * 0


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Divergence [N] of the two softmaxes, in nats."""
    p, q = torch.log_softmax(one, 1), torch.log_softmax(other, 1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def shared_risk(logits: Tensor, wrong: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_wrong), summed over samples with wrong != label and divided by all.

    Two equal terms are averaged, one from the other classes' mass and one from p_wrong, each clamped away
    from where its logarithm loses its precision, as the official code does.
    """
    fooled = wrong != labels
    if not bool(fooled.any()):
        return logits.sum() * 0
    p = torch.softmax(logits[fooled], 1)
    yes = p.gather(1, wrong[fooled][:, None]).squeeze(1)
    no = p.scatter(1, wrong[fooled][:, None], 0.0).sum(1)
    from_no = torch.log(1e-6 + no.clamp(max=0.999)).sum()
    from_yes = torch.log(1 + 1e-6 - yes.clamp(min=0.001)).sum()
    return -(from_no + from_yes) / 2 / len(labels)
