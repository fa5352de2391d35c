"""Inner maximization: perturbations that carry clean samples into a class, without knowing any trigger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from secure_export.perturbations import Perturbation, enlarged, spatial, untouched
from secure_export.purifiers._training import margin

if TYPE_CHECKING:
    from torch import Generator, Tensor

Family = Literal["patch", "l2", "linf", "warp", "blend"]
Logits = Callable[["Tensor"], "Tensor"]
CONFIDENT = 2.0
"""Margin by which the class must win before a sample stops pulling."""
FEWEST_PIXELS = 4.0
CONTROL = 8
"""Control points a side of smooth patterns and displacements."""


@dataclass(frozen=True)
class Budget:
    """How large a perturbation may be, free of the input's size: each is a range to draw from."""

    patch: tuple[float, float]
    """Mask mass as a share of the pixels."""
    l2: tuple[float, float]
    """Root mean square per input value."""
    linf: tuple[float, float]
    """Largest change of one value, inputs in [0, 1]."""
    warp: tuple[float, float]
    """Largest displacement as a share of the side."""
    blend: tuple[float, float]
    """Share of a smooth pattern in the mix."""

    def draw(self, family: Family, count: int, shape: torch.Size, generator: Generator) -> Tensor:
        """[count] budgets in the family's own unit: pixels, Euclidean norm, or a share as above."""
        low, high = getattr(self, family)
        drawn: Tensor = low + (high - low) * torch.rand(count, generator=generator)
        if family == "patch":
            return (drawn * shape[1:].numel()).clamp(min=FEWEST_PIXELS)
        return drawn * shape.numel() ** 0.5 if family == "l2" else drawn


@dataclass(frozen=True)
class Found:
    """R universal perturbations of one family, as the variables that a search moves."""

    family: Family
    budget: Tensor
    """[R] in the family's own unit."""
    place: Tensor
    """[R, ...]: logits of a patch's mask, or control points of displacements; else unused."""
    value: Tensor
    """[R, ...]: logits of a pattern, or a change before it is brought to its budget; unused in a warp."""
    shape: torch.Size

    def __len__(self) -> int:
        return len(self.budget)

    def perturbation(self) -> Perturbation:
        """What they do to an input."""
        count, whole = len(self), untouched(len(self), self.shape)
        wide = self.budget.view(count, *[1] * len(self.shape))
        if self.family == "patch":
            mask = (self.budget[:, None] * torch.softmax(self.place, 1)).clamp(max=1).view_as(whole)
            return Perturbation(1 - mask, mask * torch.sigmoid(self.value))
        if self.family == "l2":
            length = self.value.flatten(1).norm(dim=1).view_as(wide)
            return Perturbation(whole, self.value * wide / length)
        if self.family == "linf":
            return Perturbation(whole, wide * torch.tanh(self.value))
        if self.family == "blend":
            pattern = torch.sigmoid(enlarged(self.value, spatial(self.shape))).view(count, *self.shape)
            return Perturbation((1 - wide) * whole, wide * pattern)
        # grid_sample measures the side as 2.
        field = 2 * self.budget.view(-1, 1, 1, 1) * torch.tanh(enlarged(self.place, spatial(self.shape)))
        return Perturbation(whole, torch.zeros(count, *self.shape), field.permute(0, 2, 3, 1))

    def rows(self, index: Tensor | slice) -> Found:
        """Some of them."""
        return replace(self, budget=self.budget[index], place=self.place[index], value=self.value[index])

    def joined(self, other: Found) -> Found:
        """Both sets, of the same family."""
        return replace(
            self,
            budget=torch.cat([self.budget, other.budget]),
            place=torch.cat([self.place, other.place]),
            value=torch.cat([self.value, other.value]),
        )


def begun(family: Family, budget: Tensor, shape: torch.Size, generator: Generator) -> Found:
    """Noise of the family's form."""
    count, smooth = len(budget), [min(CONTROL, side) for side in spatial(shape)]
    place = {"patch": [spatial(shape).numel()], "warp": [2, *smooth]}.get(family, [1])
    value = {"warp": [1], "blend": [*shape[:-2], *smooth]}.get(family, list(shape))
    return Found(
        family,
        budget,
        torch.randn(count, *place, generator=generator),
        torch.randn(count, *value, generator=generator),
        shape,
    )


def applicable(family: Family, inputs: Tensor) -> bool:
    """Additive perturbations take any shape; the others need two axes of space."""
    return family in ("l2", "linf") or inputs.ndim == 4


def universal(
    networks: Sequence[Logits],
    inputs: Tensor,
    target_class: int,
    family: Family,
    budget: Tensor,
    *,
    start: Found | None = None,
    steps: int,
    batch: int,
    generator: Generator,
) -> Found:
    """len(budget) perturbations of `inputs` [N, ...] (none of the target class), optimized side by side.

    The first go on from `start`, the others begin as noise. They must fool all `networks`: what fools the
    original as well as the purified model is a rest of the backdoor rather than an adversarial example of
    the latter (SAU, Wei et al. 2023).

    Patches follow Neural Cleanse (Wang et al. 2019), mask and pattern at once, with the mask's mass bounded
    instead of penalized: mask = min(1, budget softmax(u)). Additive ones follow universal perturbations
    (I-BAU, Zeng et al. 2022), kept on the ball by their parametrization.
    """
    count = len(budget)
    found = begun(family, budget, inputs.shape[1:], generator)
    if start is not None:
        found.place[: len(start)], found.value[: len(start)] = start.place, start.value
    free = [variable.requires_grad_(True) for variable in (found.place, found.value)]
    optimizer = torch.optim.Adam(free, lr=0.2, betas=(0.5, 0.9))
    each = max(1, batch // count)
    which = torch.arange(count).repeat_interleave(each)
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs), (len(which),), generator=generator)
        stamped = found.perturbation().stamp(inputs[chosen], which)
        loss = torch.zeros(())
        for logits in networks:
            loss = loss + F.relu(CONFIDENT - margin(logits(stamped), target_class)).mean() * count
        gradients = torch.autograd.grad(loss, free, allow_unused=True)
        for variable, gradient in zip(free, gradients, strict=True):
            variable.grad = gradient
        optimizer.step()
    return replace(found, place=found.place.detach(), value=found.value.detach())


def per_sample(
    logits: Logits, inputs: Tensor, target_class: int, epsilon: float, steps: int, generator: Generator
) -> Tensor:
    """Inputs [N, ...] moved into the class by sign steps within epsilon (PGD, Madry et al. 2018)."""
    moved = (inputs + epsilon * (2 * torch.rand(inputs.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_(True)
        gain = margin(logits(moved), target_class).clamp(max=CONFIDENT).sum()
        (gradient,) = torch.autograd.grad(gain, moved)
        delta = (moved.detach() - inputs + 1.5 * epsilon / steps * gradient.sign()).clamp(-epsilon, epsilon)
        moved = (inputs + delta).clamp(0, 1)
    return moved.detach()


@torch.no_grad()
def success(logits: Logits, inputs: Tensor, target_class: int, found: Found) -> Tensor:
    """[R] share of `inputs` that each perturbation carries into the class."""
    rates, made = [], found.perturbation()
    for number in range(len(found)):
        stamped = made.stamp(inputs, torch.full((len(inputs),), number))
        named = torch.cat([logits(part).argmax(1) for part in torch.split(stamped, 256)])
        rates.append((named == target_class).float().mean())
    return torch.stack(rates)
