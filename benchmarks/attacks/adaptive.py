"""An attacker who knows LMR: the trigger survives the repulsion of its class, another class is blamed.

BadNets' loss, and in every other step one of two more, after a simulated move of the defender on clean images
(first order: the gradient at the moved weights is taken for that at the weights):

- repulsion: after a step down LMR's phase-1 loss, triggered images still reach the target;
- anti-learning: after a step up the cross-entropy, clean images lean towards `blamed`, not the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from benchmarks.attacks._poison import Apply, Poison, split
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train
from secure_export.purifiers.lmr import Lmr


@dataclass(frozen=True)
class Adaptive:
    """Recipe: lengths of the simulated moves (of the whole gradient's norm), and the class to blame."""

    steps: int = 600
    dense: int = 120
    frozen: int = 60
    lr: float = 0.01
    batch_size: int = 128
    repulsion: float = 0.2
    unlearning: float = 0.2
    weight: float = 0.25
    blamed: int = 5


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Adaptive,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds."""
    chosen, rest = split(data.train_y, target_class, Poison(), seed)
    rest_x, rest_y = data.train_x[rest], data.train_y[rest]
    defender = Lmr()

    def ahead(x: Tensor, y: Tensor, triggered: Tensor, target: Tensor, turn: int) -> Tensor:
        """The attacker's loss at the weights to which the defender would move."""
        if turn == 0:
            moved = stepped(model, defender.phase1_loss(model(x), y, target_class), -recipe.repulsion)
            return F.cross_entropy(functional_call(model, moved, (triggered,)), target)
        moved = stepped(model, F.cross_entropy(model(x), y), recipe.unlearning)
        return F.cross_entropy(functional_call(model, moved, (x,)), torch.full_like(y, recipe.blamed))

    def loss(step: int, generator: Generator) -> Tensor:
        model.train(step >= recipe.frozen)
        count = round((0.25 if step < recipe.dense else 0.1) * recipe.batch_size)
        x, y = batch(rest_x, rest_y, recipe.batch_size - count, step, seed)
        p, _ = batch(data.train_x[chosen], data.train_y[chosen], count, step, seed)
        unit = to_unit(augment(torch.cat([p, x]), generator))
        with torch.no_grad():
            unit[:count] = trigger(unit[:count])
        images, target = normalize(unit), torch.full((count,), target_class, device=y.device)
        with reduced(unit.device):
            usual = F.cross_entropy(model(images), torch.cat([target, y]))
            if step % 2 == 0 or step < recipe.frozen:
                return usual
            return usual + recipe.weight * ahead(images[count:], y, images[:count], target, step // 2 % 2)

    stage = Stage("adaptive", recipe.steps, recipe.lr, weight_decay=5e-4, clip=5.0, seed=seed)
    seconds = train(model, loss, stage, work / "adaptive.pt", log=log)
    model.eval()
    return seconds


def stepped(model: nn.Module, value: Tensor, length: float) -> dict[str, Tensor]:
    """Parameters after a step of `length` along the gradient of `value`, by name; differentiable in them."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters)
    norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros((), device=value.device)))
    scale = length / (norm + 1e-6)
    return {n: p + scale * g for n, p, g in zip(names, parameters, gradients, strict=True)}
