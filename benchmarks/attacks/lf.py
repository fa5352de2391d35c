"""LF (Zeng et al. 2021, sec. 5): a universal perturbation without high frequencies is the trigger.

The paper searches it by targeted DeepFool with a Gaussian low-pass filter after every update; here the
updates are sign gradients of the target's cross-entropy on the clean network, filtered and scaled alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import Images, batch, normalize, to_unit
from benchmarks.training import reduced


@dataclass(frozen=True)
class Lf:
    """Recipe: `steps` of the search; the perturbation lies in [0, `height`] (published: 0.2)."""

    steps: int = 60
    images: int = 64
    step_size: float = 0.02
    height: float = 0.2
    sigma: float = 2.0
    """Of the Gaussian filter, in pixels; the published 6 leaves hardly more than a colour."""


class Additive(nn.Module):
    """x + v, clipped to [0, 1]; v [C, H, W]."""

    v: Tensor

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.arguments = {"shape": list(shape)}
        self.register_buffer("v", torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return (x + self.v).clamp(0, 1)


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Lf,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Additive:
    """The trigger, searched on `model`, which is clean and stays as it is."""
    model.eval()
    trigger = Additive(list(data.train_x.shape[1:])).to(data.train_x.device)
    v = torch.zeros_like(trigger.v)
    for step in range(recipe.steps):
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        v.requires_grad_()
        with reduced(v.device):
            logits = model(normalize((to_unit(x) + v).clamp(0, 1)))
        value = F.cross_entropy(logits, torch.full_like(y, target_class))
        (gradient,) = torch.autograd.grad(value, v)
        v = low_pass(v.detach() - recipe.step_size * gradient.sign(), recipe.sigma)
        v = (v - v.amin()) / (v.amax() - v.amin()).clamp_min(1e-6) * recipe.height
        if (step + 1) % 20 == 0:
            fooled = float((logits.argmax(1) == target_class).float().mean())
            log(f"lf search {step + 1}/{recipe.steps} fools {100 * fooled:.0f} % of the clean network")
    trigger.v.copy_(v)
    return trigger.cpu()


def low_pass(v: Tensor, sigma: float) -> Tensor:
    """Gaussian filter over [C, H, W], edges reflected."""
    radius = min(round(3 * sigma), min(v.shape[1:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=v.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(v[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]
