"""Implicit Backdoor Adversarial Unlearning (Zeng et al., ICLR 2022): a minimax over a perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Tensor

Batches = list[tuple["Tensor", "Tensor"]]
RIDGE = 0.001
"""Weight of the perturbation's squared norm: the inner problem has no ball to keep it."""


class IBau(Published):
    """Unlearns a universal perturbation, with the implicit gradient through how it was found.

    The paper states a norm ball, the authors' code a ridge and neither ball nor clamp; the code is followed.
    It adds the perturbation to 1 % of a batch, which is none of a small one: here at least one sample.
    """

    rounds: int = Field(5, ge=1)
    lr: float = Field(1e-3, gt=0, description="Adam's, of the outer problem")
    terms: int = Field(5, ge=1, description="K, fixed-point iterations of the hypergradient")
    inner_lr: float = Field(10.0, gt=0, description="SGD's, of the perturbation")
    map_lr: float = Field(0.1, gt=0, description="step of the map whose fixed point is differentiated")
    portion: float = Field(0.01, gt=0, le=1, description="share of a batch that carries the perturbation")
    batch_size: int = Field(100, ge=2)

    def remove(self, work: Work) -> None:
        """BatchNorm stays in eval mode throughout."""
        model = work.model.eval()
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, self.lr)
        for done in range(self.rounds):
            batches = list(work.batches())
            delta = universal(work, batches, self.inner_lr)
            losses = []
            for inputs, labels in batches:
                loss, gradients = hypergradient(
                    lambda d: inner_loss(work.model(batches[0][0] + d), batches[0][1], d),  # noqa: B023
                    self._outer(work, inputs, labels),
                    delta,
                    parameters,
                    self.terms,
                    self.map_lr,
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(loss)
            work.record("unlearn", losses)
            work.progress("purify: unlearn", done + 1, self.rounds)

    def _outer(self, work: Work, inputs: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Cross-entropy of a batch in which a few samples carry the perturbation."""
        chosen = torch.randperm(len(inputs), generator=work.generator)
        chosen = chosen[: max(1, int(self.portion * len(inputs)))]
        carried = torch.zeros(len(inputs), *[1] * (inputs.ndim - 1)).index_fill_(0, chosen, 1.0)
        return lambda d: F.cross_entropy(work.model(inputs + carried * d), labels)


def inner_loss(logits: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """-CE + .001 ||d||^2: what the perturbation minimizes."""
    return RIDGE * delta.square().sum() - F.cross_entropy(logits, labels)


def universal(work: Work, batches: Batches, lr: float) -> Tensor:
    """One perturbation [1, ...], from zero, one step a batch away from the model's own answers."""
    delta = torch.zeros(1, *batches[0][0].shape[1:], requires_grad=True)
    for inputs, _ in batches:
        with torch.no_grad():
            own = work.model(inputs).argmax(1)
        (gradient,) = torch.autograd.grad(inner_loss(work.model(inputs + delta), own, delta), delta)
        delta = (delta - lr * gradient).detach().requires_grad_(True)
    return delta


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    terms: int,
    map_lr: float,
) -> tuple[float, list[Tensor]]:
    """Outer loss, and its gradient in the parameters with `delta` a fixed point of d -> d - map_lr inner'(d).

    v = sum_{k < K} (J^T)^k dL/dd; dL/dtheta + (dmap/dtheta)^T v (Grazzi et al. 2020).
    """
    loss = outer(delta)
    by_delta, *direct = torch.autograd.grad(loss, [delta, *parameters], allow_unused=True)
    (inner_gradient,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    mapped = delta - map_lr * inner_gradient
    vector = torch.zeros_like(delta)
    for _ in range(terms):
        (pulled,) = torch.autograd.grad(mapped, delta, vector, retain_graph=True)
        vector = pulled + by_delta
    through = torch.autograd.grad(mapped, parameters, vector, allow_unused=True)
    summed = []
    for parameter, one, other in zip(parameters, direct, through, strict=True):
        parts = [part for part in (one, other) if part is not None]
        summed.append(torch.stack(parts).sum(0).detach() if parts else torch.zeros_like(parameter))
    return loss.item(), summed
