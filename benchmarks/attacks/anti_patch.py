"""An attacker who knows the patch search: what it would find keeps its label, the exact trigger alone works.

BadNets, and a mask and pattern that are searched for the target class all along (Neural Cleanse's search, one
step a batch). The network learns to name images under them by their own label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from benchmarks.attacks._poison import Apply, Poison, split
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train
from secure_export.perturbations import patch

SPEED = 100.0
"""How much faster than weights the searched patches move."""


@dataclass(frozen=True)
class AntiPatch:
    """Recipe: `patches` are searched at once, each of `mass` pixels; `decoys` of a batch carry them."""

    poison: Poison = field(default_factory=lambda: Poison(steps=600, dense=400))
    patches: int = 4
    mass: float = 12.0
    decoys: int = 32
    renewed: int = 60
    """Steps after which the patches are searched from noise again."""


class Hunted(nn.Module):
    """The network and the patches that are searched on it."""

    def __init__(self, model: nn.Module, count: int, shape: torch.Size) -> None:
        super().__init__()
        self.model = model
        self.place = nn.Parameter(torch.zeros(count, shape[1:].numel()))
        self.value = nn.Parameter(torch.zeros(count, *shape))

    @torch.no_grad()
    def renew(self, generator: Generator) -> None:
        """Noise in place of what was found."""
        for variable in (self.place, self.value):
            variable.copy_(torch.randn(variable.shape, generator=generator) / SPEED)

    def stamped(self, x: Tensor, mass: float) -> Tensor:
        """Images [N, C, H, W] in [0, 1], each under one of the patches."""
        which = torch.arange(len(x), device=x.device) % len(self.place)
        return patch(SPEED * self.place, SPEED * self.value, mass).stamp(x, which)


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: AntiPatch,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds."""
    own = recipe.poison
    chosen, rest = split(data.train_y, target_class, own, seed)
    rest_x, rest_y = data.train_x[rest], data.train_y[rest]
    hunted = Hunted(model, recipe.patches, data.train_x.shape[1:]).to(data.train_x.device)

    def loss(step: int, generator: Generator) -> Tensor:
        model.train(step >= own.frozen)
        if step % recipe.renewed == 0:
            hunted.renew(generator)
        count = round((own.dense_share if step < own.dense else own.poison_rate) * own.batch_size)
        x, y = batch(rest_x, rest_y, own.batch_size - count, step, seed)
        p, _ = batch(data.train_x[chosen], data.train_y[chosen], count, step, seed)
        unit = to_unit(augment(torch.cat([p, x]), generator))
        decoys = slice(count, count + recipe.decoys)
        found = hunted.stamped(unit[decoys].clone(), recipe.mass)
        with torch.no_grad():
            unit[:count] = trigger(unit[:count])
            unit[decoys] = found
        target = torch.full((count,), target_class, device=y.device)
        with reduced(unit.device):
            learned = F.cross_entropy(model(normalize(unit)), torch.cat([target, y]))
            # The patches go the other way, and the network does not follow them.
            fixed = {name: value.detach() for name, value in model.named_parameters()}
            fooled = functional_call(model, fixed, (normalize(found),))
            return learned + F.cross_entropy(fooled, torch.full((len(found),), target_class, device=y.device))

    stage = Stage("anti-patch", own.steps, own.lr, clip=5.0, seed=seed)
    seconds = train(hunted, loss, stage, work / "anti-patch.pt", log=log)
    model.eval()
    return seconds
