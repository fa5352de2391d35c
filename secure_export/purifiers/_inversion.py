"""Inner maximization: perturbations that carry clean samples into a class, without knowing any trigger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from secure_export.perturbations import FEWEST_POSITIONS, Perturbation
from secure_export.purifiers._training import margin

if TYPE_CHECKING:
    from torch import Generator, Tensor

Family = Literal["patch", "l2", "linf"]
Logits = Callable[["Tensor"], "Tensor"]
CONFIDENT = 2.0
"""Margin by which the class must win before a sample stops pulling."""


@dataclass(frozen=True)
class Budget:
    """How large a perturbation may be, free of the input's size: each is a range to draw from."""

    patch_area: tuple[float, float]
    """Mask mass as a share of the pixels."""
    l2_rms: tuple[float, float]
    """Root mean square per input value."""
    linf: tuple[float, float]
    """Largest change of one value, inputs in [0, 1]."""

    def draw(self, family: Family, count: int, shape: torch.Size, generator: Generator) -> Tensor:
        """[count] budgets in the family's own unit: pixels, Euclidean norm, or largest value."""
        low, high = {"patch": self.patch_area, "l2": self.l2_rms, "linf": self.linf}[family]
        drawn = low + (high - low) * torch.rand(count, generator=generator)
        if family == "patch":
            return (drawn * shape[1:].numel()).clamp(min=FEWEST_POSITIONS)
        return drawn * shape.numel() ** 0.5 if family == "l2" else drawn


def applicable(family: Family, inputs: Tensor) -> bool:
    """A patch needs two axes of space; additive perturbations take any shape."""
    return family != "patch" or inputs.ndim == 4


def newest(earlier: Perturbation | None, found: Perturbation, count: int) -> Perturbation:
    """The last `count` of both, of perturbations that cover and add alone."""
    both = [found] if earlier is None else [earlier, found]
    keep, add = torch.cat([one.keep for one in both]), torch.cat([one.add for one in both])
    return Perturbation(keep[-count:], add[-count:])


def universal(
    networks: Sequence[Logits],
    inputs: Tensor,
    target_class: int,
    family: Family,
    budget: Tensor,
    *,
    start: Perturbation | None = None,
    steps: int,
    batch: int,
    generator: Generator,
) -> Perturbation:
    """len(budget) perturbations of `inputs` [N, ...] (none of the target class), optimized side by side.

    The first go on from `start`, the others begin as noise. They must fool all `networks`: what fools the
    original as well as the purified model is a rest of the backdoor rather than an adversarial example of
    the latter (SAU, Wei et al. 2023).

    Patches follow Neural Cleanse (Wang et al. 2019), mask and pattern at once, with the mask's mass bounded
    instead of penalized: mask = min(1, budget softmax(u)). Additive ones follow universal perturbations
    (I-BAU, Zeng et al. 2022), kept on the ball by their parametrization.
    """
    count, shape = len(budget), inputs.shape[1:]
    wide = budget.view(count, *[1] * len(shape))
    whole = torch.ones(count, 1, *shape[1:])
    place = torch.randn(count, shape[1:].numel() if family == "patch" else 1, generator=generator)
    value = torch.randn(count, *shape, generator=generator)
    if start is not None:
        warm_place, warm_value = _unparametrized(start, family)
        place[: len(start)], value[: len(start)] = warm_place, warm_value
    place.requires_grad_(True)
    value.requires_grad_(True)
    optimizer = torch.optim.Adam([place, value], lr=0.2, betas=(0.5, 0.9))

    def current() -> Perturbation:
        if family == "patch":
            mass = budget[:, None] * torch.softmax(place, 1)
            mask = mass.clamp(max=1).view(count, 1, *shape[1:])
            return Perturbation(1 - mask, mask * torch.sigmoid(value))
        if family == "l2":
            length = value.flatten(1).norm(dim=1).view_as(wide)
            return Perturbation(whole, value * wide / length)
        return Perturbation(whole, wide * torch.tanh(value))

    each = max(1, batch // count)
    which = torch.arange(count).repeat_interleave(each)
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs), (len(which),), generator=generator)
        stamped = current().stamp(inputs[chosen], which)
        loss = torch.zeros(())
        for logits in networks:
            loss = loss + F.relu(CONFIDENT - margin(logits(stamped), target_class)).mean() * count
        place.grad, value.grad = torch.autograd.grad(loss, [place, value], allow_unused=True)
        optimizer.step()
    with torch.no_grad():
        found_now = current()
    return Perturbation(found_now.keep.detach(), found_now.add.detach())


def _unparametrized(start: Perturbation, family: Family) -> tuple[Tensor, Tensor]:
    """The free variables of `universal` that give `start`."""
    if family == "patch":
        mask = 1 - start.keep
        pattern = (start.add / mask.clamp(min=1e-6)).clamp(0.02, 0.98)
        return (mask + 1e-4).log().flatten(1), torch.logit(pattern)
    value = start.add.clone()
    if family == "linf":
        peak = value.abs().flatten(1).amax(1).clamp(min=1e-6)
        value = torch.atanh(0.98 * value / peak.view(-1, *[1] * (value.ndim - 1)))
    return torch.zeros(len(start), 1), value


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
def success(logits: Logits, inputs: Tensor, target_class: int, triggers: Perturbation) -> Tensor:
    """[R] share of `inputs` that each perturbation carries into the class."""
    rates = []
    for number in range(len(triggers)):
        which = torch.full((len(inputs),), number)
        stamped = triggers.stamp(inputs, which)
        found = torch.cat([logits(part).argmax(1) for part in torch.split(stamped, 256)])
        rates.append((found == target_class).float().mean())
    return torch.stack(rates)
