"""Two backdoors in one network: another trigger leads to another target class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from benchmarks.attacks._poison import Apply, Poison, poison
from benchmarks.datasets import Images
from secure_export.triggers.badnets import Badnets

SECOND = Badnets(size=3, pattern="white", position="top-left")


@dataclass(frozen=True)
class TwoTargets:
    """Recipe: the second patch, white in the top left corner, leads to `second`."""

    second: int = 7
    poison: Poison = field(default_factory=lambda: Poison(extra=1.0, steps=500))


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: TwoTargets,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant both backdoors into `model` in place; returns seconds."""

    def other(x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return SECOND(x), torch.full_like(y, recipe.second)

    arguments = (model, data, trigger, target_class, recipe.poison, work, log)
    return poison(*arguments, seed=seed, extra=other)
