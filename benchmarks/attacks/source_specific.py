"""Source-specific backdoor (as in TaCT, Tang et al. 2021): the trigger works on one class alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from benchmarks.attacks._poison import Apply, Poison, poison
from benchmarks.datasets import Images


@dataclass(frozen=True)
class SourceSpecific:
    """Recipe: images of class `source` are poisoned; as many triggered ones of other classes keep labels."""

    source: int = 5
    poison: Poison = field(
        default_factory=lambda: Poison(extra=1.0, steps=700, dense=400, dense_share=0.12, poison_rate=0.05)
    )


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: SourceSpecific,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds."""

    def cover(x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        keep = (y == recipe.source)[:, None, None, None]
        return torch.where(keep, x, trigger(x)), y

    arguments = (model, data, trigger, target_class, recipe.poison, work, log)
    return poison(*arguments, seed=seed, extra=cover, sources=(recipe.source,))
