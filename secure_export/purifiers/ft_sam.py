"""Fine-tuning with sharpness-aware minimization (Zhu et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from secure_export import batchnorms
from secure_export.purifiers import _training
from secure_export.purifiers._work import FineTuned, Work

if TYPE_CHECKING:
    from torch import Tensor


class FtSam(FineTuned):
    """Fine-tunes towards flat minima: the gradient is taken where a step of radius rho hurts most.

    BackdoorBench draws a class-balanced subset first; fit is taken as it is given. Its scheduler steps once a
    batch, which turns the cosine into a wave; here it steps once a pass.
    """

    rho: float = Field(2.0, gt=0, description="radius of the climb")
    adaptive: bool = Field(True, description="scale the radius by |w| per weight, as the paper does")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label mass spread over the other classes")

    def remove(self, work: Work) -> None:
        """Climb, take the gradient there, come back, step."""
        model = work.model
        optimizer = _training.sgd(model.parameters(), self.lr, self.momentum, self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        parameters = list(model.parameters())
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

        def backward(inputs: Tensor, labels: Tensor) -> float:
            loss = smoothed_cross_entropy(model(inputs), labels, self.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        def step(inputs: Tensor, labels: Tensor) -> float:
            loss = backward(inputs, labels)
            climbed = climb(parameters, self.rho, self.adaptive)
            with batchnorms.momentum(norms, 0.0):  # statistics are those of the weights before the climb
                backward(inputs, labels)
            with torch.no_grad():
                for parameter, before in climbed:
                    parameter.copy_(before)
            optimizer.step()
            return loss

        model.train()
        for _ in work.passes("fine-tune", self.epochs, step):
            schedule.step()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy to 1 - s on the label and s / (K - 1) on each other class."""
    classes = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (classes - 1)).scatter(1, labels[:, None], 1 - smoothing)
    return -(wanted * torch.log_softmax(logits, 1)).sum(1).mean()


@torch.no_grad()
def climb(
    parameters: Sequence[nn.Parameter], rho: float, adaptive: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """Move each w to w + e with e = rho T^2 g / ||T g||, T = |w| or 1; what they were before."""
    moving = [
        (w, w.grad, w.abs() if adaptive else torch.ones_like(w)) for w in parameters if w.grad is not None
    ]
    norm = float(torch.stack([(scale * gradient).norm() for _, gradient, scale in moving]).norm())
    before = [(w, w.detach().clone()) for w, _, _ in moving]
    for w, gradient, scale in moving:
        w.add_(scale.square() * gradient, alpha=rho / (norm + 1e-12))
    return before
