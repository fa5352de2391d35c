"""Max margin: how far above all others can any input at all push a class?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from secure_export import views
from secure_export.locators import Locator
from secure_export.records.measured import Suspect
from secure_export.records.memory import Progress, Split, View, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class MaxMargin(Locator):
    """MM-BD (Wang et al., S&P 2024): the class whose largest margin over inputs in [0, 1] is an outlier.

    For each class c: max over x of z_c(x) - max_j!=c z_j(x), by gradient ascent from noise. A backdoor
    inflates its target's. The p-value of the largest is that of the maximum of as many draws from a gamma
    law fitted to the others. No sample is needed.
    """

    starts: int = Field(6, ge=1, description="random starts per class")
    steps: int = Field(60, ge=1, description="ascent steps")
    lr: float = Field(0.05, gt=0, description="step of Adam, in units of the input range")
    max_p: float = Field(0.05, gt=0, lt=1, description="naming a class takes this p-value at most")

    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """Name the class with the largest margin when the others do not explain it."""
        with views.gradients("max-margin needs gradients"):
            margins = largest_margins(
                views.searchable(view, fit, "max-margin needs gradients"),
                fit.inputs.shape[1:],
                view.weight.shape[0],
                starts=self.starts,
                steps=self.steps,
                lr=self.lr,
                generator=torch.Generator().manual_seed(seed),
                progress=progress,
            )
        named = int(margins.argmax())
        p = outlier_p(margins.tolist())
        return Suspect(
            locator=self.kind,
            setting=view.setting,
            target_class=named if p <= self.max_p else None,
            scores=tuple(float(margin) for margin in margins),
            evidence={"largest": named, "margin": float(margins[named]), "p": p},
        )


def largest_margins(
    twin: Callable[[Tensor], Tensor],
    shape: torch.Size,
    classes: int,
    *,
    starts: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """[classes] largest margin found for each, over inputs of `shape` in [0, 1]; all classes side by side."""
    targets = torch.arange(classes).repeat_interleave(starts)
    inputs = torch.rand(len(targets), *shape, generator=generator)
    best = torch.full((len(targets),), -torch.inf)
    own = torch.nn.functional.one_hot(targets, classes).bool()
    inputs.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=lr)
    for done in range(steps + 1):
        logits = twin(inputs)
        margins = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
        best = torch.maximum(best, margins.detach())
        (gradient,) = torch.autograd.grad(-margins.sum(), inputs)
        inputs.grad = gradient
        optimizer.step()
        with torch.no_grad():
            inputs.clamp_(0, 1)
        progress("locate: max-margin", done, steps)
    return best.view(classes, starts).amax(1)


def outlier_p(values: list[float]) -> float:
    """1 - F(max)^K with F a gamma law of the mean and variance of all but the largest value (MM-BD)."""
    from scipy.special import gammainc

    ordered = sorted(values)
    rest, largest = ordered[:-1], ordered[-1]
    if len(rest) < 3 or min(rest) <= 0:
        return 1.0
    mean = sum(rest) / len(rest)
    # Classes that are all alike would leave no width at all.
    variance = max(sum((value - mean) ** 2 for value in rest) / (len(rest) - 1), (0.01 * mean) ** 2)
    return float(1 - gammainc(mean**2 / variance, largest * mean / variance) ** len(values))
