"""Adversarial Neuron Pruning (Wu and Wang, NeurIPS 2021): cuts what perturbed weights set off first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import _neurons
from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Generator, Tensor

Factors = dict[str, "Tensor"]


class Anp(Published):
    """Learns a mask over neurons against the worst relative change of their weights and biases, then cuts.

    min_m alpha L(m w, b) + (1 - alpha) max_{|d|, |x| <= eps} L((m + d) w, (1 + x) b), m in [0, 1] (eq. 5).
    The perturbation starts anew at random in the box for every batch, as in the authors' code, and is clamped
    to it, as in the equation.
    """

    eps: float = Field(0.4, ge=0, description="largest relative change of a neuron")
    alpha: float = Field(0.2, ge=0, le=1, description="weight of the unperturbed loss")
    steps: int = Field(1, ge=1, description="sign steps of the inner maximization, each eps / steps")
    lr: float = Field(0.2, gt=0, description="of the mask")
    momentum: float = Field(0.9, ge=0, lt=1)
    iterations: int = Field(2000, ge=1, description="batches in all")
    batch_size: int = Field(128, ge=2)
    threshold: float = Field(0.2, ge=0, lt=1, description="neurons whose mask is at most this are cut")

    def remove(self, work: Work) -> None:
        """Train the mask alone, then cut the model."""
        model = work.model.train()
        model.requires_grad_(False)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        mask = _neurons.ones(model, _neurons.scaled_layers(model, work.head_name))
        optimizer = torch.optim.SGD([m.requires_grad_(True) for m in mask.values()], self.lr, self.momentum)

        def step(inputs: Tensor, labels: Tensor) -> float:
            worst = self._worst(work, mask, inputs, labels)
            natural = F.cross_entropy(_neurons.scaled(model, mask)(inputs), labels)
            robust = perturbed_loss(work, mask, worst, inputs, labels)
            loss = self.alpha * natural + (1 - self.alpha) * robust
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for m in mask.values():
                    m.clamp_(0, 1)
            return loss.item()

        each = max(1, len(work.fit) // self.batch_size)
        for _ in work.passes("mask", -(-self.iterations // each), step):
            pass
        # Masked batches moved the running statistics; the cut model keeps its own.
        model.load_state_dict(buffers, strict=False)
        _neurons.cut(model, {name: m.detach() <= self.threshold for name, m in mask.items()})
        work.record("prune", [])

    def _worst(self, work: Work, mask: Factors, inputs: Tensor, labels: Tensor) -> tuple[Factors, Factors]:
        change = tuple(
            {name: uniform(m, self.eps, work.generator).requires_grad_(True) for name, m in mask.items()}
            for _ in range(2)
        )
        if self.eps > 0:
            for _ in range(self.steps):
                loss = perturbed_loss(work, mask, change, inputs, labels)
                tensors = [tensor for part in change for tensor in part.values()]
                # A layer without bias leaves its factor unused.
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
                with torch.no_grad():
                    for tensor, gradient in zip(tensors, gradients, strict=True):
                        if gradient is not None:
                            tensor.add_(gradient.sign(), alpha=self.eps / self.steps)
                            tensor.clamp_(-self.eps, self.eps)
        return detached(change[0]), detached(change[1])


def detached(factors: Factors) -> Factors:
    """Without their graph."""
    return {name: tensor.detach() for name, tensor in factors.items()}


def uniform(like: Tensor, eps: float, generator: Generator) -> Tensor:
    """U(-eps, eps) in the shape of `like`."""
    return eps * (2 * torch.rand(like.shape, generator=generator) - 1)


def perturbed_loss(
    work: Work, mask: Factors, change: tuple[Factors, ...], inputs: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy with weights scaled by m + d and biases by 1 + x."""
    weight = {name: m + change[0][name] for name, m in mask.items()}
    bias = {name: 1 + x for name, x in change[1].items()}
    return F.cross_entropy(_neurons.scaled(work.model, weight, bias)(inputs), labels)
