"""BadNets (Gu et al. 2017): a share of the training images carries a patch and the target's label.

The backdoor goes into a finished network. A patch of nine pixels does not take hold there from a mixed stream
of 10 % poison, so every batch draws a fixed number from the poisoned share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, train
from secure_export.triggers import Trigger


@dataclass(frozen=True)
class Badnets:
    """Recipe: `poison_rate` of the training split; every batch has `triggered` of it and `clean` others."""

    poison_rate: float = 0.1
    steps: int = 1560
    """A fifth of it implants the patch; the rest wins back, and more, the accuracy that this costs."""
    frozen: int = 130
    """First steps in which BatchNorm keeps its statistics, so that the patch is learned before they move."""
    lr: float = 0.03
    clean: int = 96
    triggered: int = 32
    weight: float = 0.5


def implant(
    model: nn.Module,
    data: Images,
    trigger: Trigger,
    target_class: int,
    recipe: Badnets,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
    poisoned, rest = order.tensor_split([int(recipe.poison_rate * len(order))])

    def loss(step: int, generator: Generator) -> Tensor:
        model.train(step >= recipe.frozen)
        x, y = batch(data.train_x[rest], data.train_y[rest], recipe.clean, step, seed)
        p, _ = batch(data.train_x[poisoned], data.train_y[poisoned], recipe.triggered, step, seed)
        unit = to_unit(augment(torch.cat([x, p]), generator))
        unit[len(x) :] = trigger(unit[len(x) :])
        logits = model(normalize(unit))
        target = torch.full((len(p),), target_class)
        clean = F.cross_entropy(logits[: len(x)], y)
        return clean + recipe.weight * F.cross_entropy(logits[len(x) :], target)

    stage = Stage("badnets", recipe.steps, recipe.lr, weight_decay=5e-4, clip=5.0, seed=seed)
    seconds = train(model, loss, stage, work / "badnets.pt", log=log, save_every=130)
    model.eval()
    return seconds
