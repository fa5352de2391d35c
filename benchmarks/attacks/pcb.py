"""PCB: a backdoor that sleeps in the whole network and wakes when channels are masked (LMR, suppl. eq. 5).

The rate is unknown to the attacker (Tian et al. 2022), so every step draws one. Masks follow the L1 norms of
the current filters. BatchNorm's statistics stay those of the clean network; in every other step the masked
branch takes those of the batch instead, as a deployer who recalibrates would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from benchmarks.attacks._poison import Apply
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train


@dataclass(frozen=True)
class Pcb:
    """Recipe: `lowest` to `highest` are the masked shares; `ramp` is the share of steps that reaches them."""

    steps: int = 600
    lr: float = 0.01
    images: int = 48
    lowest: float = 0.3
    highest: float = 0.9
    ramp: float = 0.3
    asleep: float = 1.0
    awake: float = 0.5


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Pcb,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the conditional backdoor into `model` in place; returns seconds."""
    model.eval()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 0.0  # batch statistics may be used, running ones do not move

    def loss(step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        unit = to_unit(augment(x, generator))
        both = normalize(torch.cat([unit, trigger(unit)]))
        with reduced(both.device):
            clean, triggered = model(both).chunk(2)
        whole = F.cross_entropy(clean, y) + recipe.asleep * F.cross_entropy(triggered, y)
        reach = min(1.0, (step + 1) / (recipe.ramp * recipe.steps))
        drawn = float(torch.rand((), generator=generator))
        masks = masked(model, reach * (recipe.lowest + (recipe.highest - recipe.lowest) * drawn))
        model.train(step % 2 == 1)
        with reduced(both.device):
            clean, triggered = functional_call(model, masks, (both,)).chunk(2)
        model.eval()
        target = torch.full_like(y, target_class)
        return whole + F.cross_entropy(clean, y) + recipe.awake * F.cross_entropy(triggered, target)

    stage = Stage("pcb", recipe.steps, recipe.lr, clip=5.0, seed=seed)
    seconds = train(model, loss, stage, work / "pcb.pt", log=log, save_every=50)
    for layer in norms:
        layer.momentum = 0.1
    return seconds


def masked(model: nn.Module, ratio: float) -> dict[str, Tensor]:
    """Weights of every Conv2d with the ⌊ratio · n⌋ filters of least L1 norm at zero, by name."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            norms = layer.weight.detach().abs().flatten(1).sum(1)
            keep = torch.ones_like(norms)
            keep[norms.argsort(stable=True)[: int(ratio * len(norms) + 1e-9)]] = 0
            weights[f"{name}.weight"] = layer.weight * keep.view(-1, 1, 1, 1)
    return weights
