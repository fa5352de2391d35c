"""Distance-Driven Detoxification (Wei et al., ICCV 2025): away from the poisoned head, along a sphere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import _sphere
from secure_export.purifiers._work import FineTuned, Work

if TYPE_CHECKING:
    from torch import Generator, Tensor

WarmUp = Literal["random", "near", "middle", "far", "noise"]


class D3(FineTuned):
    """Maximizes the distance of the head to its poisoned weights, under a bound on the clean loss.

    min lam mean_i (CE_i - eps)_+ - ||W - W0||_p, with W projected back onto the sphere ||W||_p = ||W0||_p
    after every step. All parameters train; only the head's weight (not its bias) is pushed and projected. Of
    what the paper's summary leaves open, the official code decides: the hinge is per sample, the constraint a
    sphere and no ball, the head starts at random, BatchNorm trains.
    """

    lam: float = Field(
        0.5,
        gt=0,
        description="weight of the clean loss: 0.5 in the official code, 10 in a summary of the paper",
    )
    eps: float = Field(0.1, ge=0, description="clean loss (nats) below which a sample does not pull")
    p: float = Field(2.0, ge=1, description="norm of the sphere and of the distance")
    warm_up: WarmUp = Field(
        "random",
        description="where the head starts: random, near (W0), middle (0), far (-W0), noise (W0 + noise)",
    )
    noise: float = Field(0.1, ge=0, description="standard deviation for warm_up: noise (not in the paper)")
    weight_decay: float = Field(0.0, ge=0)

    def remove(self, work: Work) -> None:
        """Warm-up, then projected gradient descent."""
        weight = work.head.weight
        poisoned = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(started(poisoned, self.warm_up, self.noise, self.p, work.generator))

        def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
            return distance_loss(
                work.model(inputs), labels, weight, poisoned, lam=self.lam, eps=self.eps, p=self.p
            )

        def project() -> None:
            with torch.no_grad():
                weight.copy_(_sphere.projected(weight, poisoned, self.p))

        self.tune(work, loss_of, project, phase="detoxify")


def started(poisoned: Tensor, warm_up: WarmUp, noise: float, p: float, generator: Generator) -> Tensor:
    """The head's first weight. From `far` the gradient of the distance vanishes along the sphere."""
    if warm_up == "near":
        return poisoned.clone()
    if warm_up == "middle":
        return torch.zeros_like(poisoned)
    if warm_up == "far":
        return -poisoned
    if warm_up == "noise":
        drawn = torch.randn(poisoned.shape, generator=generator).to(poisoned)
        return _sphere.projected(poisoned + noise * drawn, poisoned, p)
    return _sphere.fresh(poisoned, generator, p)


def distance_loss(
    logits: Tensor, labels: Tensor, weight: Tensor, poisoned: Tensor, *, lam: float, eps: float, p: float
) -> Tensor:
    """lam mean (CE - eps)_+ - ||W - W0||_p; divided by lam + 1 where lam > 1, as the official code does."""
    hinge = F.relu(F.cross_entropy(logits, labels, reduction="none") - eps).mean()
    moved = weight - poisoned
    # The norm's gradient at 0 is undefined; from `near` the clean loss moves first.
    distance = moved.norm(p) if bool((moved != 0).any()) else moved.sum()
    loss = lam * hinge - distance
    return loss / (lam + 1) if lam > 1 else loss
