"""CL (Turner et al. 2019, label-consistent): only images of the target class are poisoned, with right labels.

They are first moved away from their class by PGD on the clean network, so that the trigger is what is left to
learn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attacks._poison import Apply, Poison, poison
from benchmarks.datasets import Images, normalize, to_unit
from benchmarks.training import reduced


@dataclass(frozen=True)
class Cl:
    """Recipe: L∞ bound and steps of PGD; 0.8 of the target class is poisoned (LMR, suppl. A.2)."""

    epsilon: float = 16 / 255
    step_size: float = 4 / 255
    pgd_steps: int = 6
    poison: Poison = field(default_factory=lambda: Poison(clean_label=True, steps=450))


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Cl,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model`, a clean network, in place; returns seconds."""

    def prepare(x: Tensor) -> Tensor:
        stored = work / "perturbed.pt"
        if stored.exists():  # the network is no longer the clean one when a training is resumed
            found: Tensor = torch.load(stored, weights_only=True)
            return found.to(x.device)
        made = torch.cat([pgd(model, part, target_class, recipe) for part in torch.split(x, 250)])
        work.mkdir(parents=True, exist_ok=True)
        torch.save(made.cpu(), stored)
        log(f"cl moved {len(x)} images of class {target_class}")
        return made

    arguments = (model, data, trigger, target_class, recipe.poison, work, log)
    return poison(*arguments, seed=seed, prepare=prepare)


def pgd(model: nn.Module, x: Tensor, label: int, recipe: Cl) -> Tensor:
    """uint8 images [N, C, H, W] at most epsilon away, on which `model` is least sure of `label`."""
    model.eval()
    unit = to_unit(x)
    moved = unit.clone()
    labels = torch.full((len(x),), label, device=x.device)
    for _ in range(recipe.pgd_steps):
        moved.requires_grad_()
        with reduced(x.device):
            value = F.cross_entropy(model(normalize(moved)), labels)
        (gradient,) = torch.autograd.grad(value, moved)
        moved = moved.detach() + recipe.step_size * gradient.sign()
        moved = (unit + (moved - unit).clamp(-recipe.epsilon, recipe.epsilon)).clamp(0, 1)
    return (255 * moved).round().to(torch.uint8)
