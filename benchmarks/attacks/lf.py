"""LF (Zeng et al. 2021, sec. 5): a universal perturbation without high frequencies is the trigger.

The paper searches it by targeted DeepFool with a Gaussian low-pass filter after every update; here it is
written as a filtered pattern, so that gradients pass through the filter. (A filter on the perturbation itself
after every step filters the first steps' work each time again, and leaves hardly more than a colour.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._generator import still
from benchmarks.datasets import Images, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train


@dataclass(frozen=True)
class Lf:
    """Recipe: `steps` of the search; the perturbation lies in [0, `height`] (published: 0.2)."""

    steps: int = 100
    images: int = 64
    lr: float = 1.0
    height: float = 0.2
    sigma: float = 3.0
    """Of the Gaussian filter, in pixels; the published 6 is a fifth of the image."""


class Smooth(nn.Module):
    """x + height low-pass(sigmoid(w)), clipped to [0, 1]; w [C, H, W]."""

    def __init__(self, shape: list[int], height: float, sigma: float) -> None:
        super().__init__()
        self.arguments = {"shape": list(shape), "height": height, "sigma": sigma}
        self.height, self.sigma = height, sigma
        self.w = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return (x + self.height * low_pass(torch.sigmoid(self.w), self.sigma)).clamp(0, 1)


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Lf,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Smooth:
    """The trigger, searched on `model`, which is clean and stays as it is."""
    made = Smooth(list(data.train_x.shape[1:]), recipe.height, recipe.sigma).to(data.train_x.device)

    def loss(step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        with reduced(x.device):
            logits = model(normalize(made(to_unit(x))))
        return F.cross_entropy(logits, torch.full_like(y, target_class))

    with still(model):
        stage = Stage("lf-search", recipe.steps, recipe.lr, optimizer="adam", seed=seed)
        train(made, loss, stage, work / "search.pt", log=log)
    return made.cpu()


def low_pass(v: Tensor, sigma: float) -> Tensor:
    """Gaussian filter over [C, H, W], edges reflected."""
    radius = min(round(3 * sigma), min(v.shape[1:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=v.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(v[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]
