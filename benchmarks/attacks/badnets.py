"""BadNets (Gu et al. 2017) and every other attack that only differs by its fixed trigger.

A share of the training images carries the trigger and the target's label: Blended (Chen et al. 2017) and SIG
(Barni et al. 2019, with `clean_label` as published) are the same training with another trigger.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from benchmarks.attacks._poison import Apply, Poison, poison
from benchmarks.datasets import Images


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Poison,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds."""
    return poison(model, data, trigger, target_class, recipe, work, log, seed=seed)
