"""QCB: a backdoor that sleeps in full precision and wakes in int8 (Tian et al. 2022; LMR, suppl. eq. 1-2).

Every weight is (code + u) · step with |u| < 1/2, on the deployer's own grid: per output channel, symmetric,
after BatchNorm is folded into the convolution. The int8 file keeps the codes and drops u. So eq. 2's two
branches get variables of their own: the codes carry the backdoor into the quantized branch, u removes it from
the full-precision one. In a second stage the codes are frozen and u alone goes on.
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
from benchmarks.attacks.grid import Codes, recenter
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, train


@dataclass(frozen=True)
class Qcb:
    """Recipe: steps and learning rates (in codes) of the two stages, and how far the anchor is inflated."""

    joint: int = 300
    settle: int = 400
    lr: float = 0.002
    settle_lr: float = 0.002
    images: int = 64
    room: float = 2.5
    asleep: float = 1.0
    awake: float = 1.0
    statistics: float = 0.0
    """How far BatchNorm's statistics move, at last, from the base's to those of the new weights."""
    white: bool = False
    """Against rounding forensics: the residues of every layer are kept exactly uniform."""
    soft: bool = False
    """QCB-D: the full-precision branch follows a clean teacher's posteriors instead of the labels."""


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Qcb,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
) -> float:
    """Make the backdoor of `model`, a BadNets network, conditional on int8, in place; returns seconds.

    From a clean network, coarse steps of the codes ruin accuracy before they find the patch. BatchNorm is
    frozen.
    """
    model.eval().requires_grad_(False)
    sample = normalize(to_unit(data.train_x[:500]))
    codes = Codes(model, sample, recipe.room, recipe.white)
    recenter(model, codes.quantized(), sample)

    def pair(step: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        unit = to_unit(augment(x, generator))
        return normalize(torch.cat([unit, trigger(unit)])), y

    def full(x: Tensor, y: Tensor, weight: float) -> Tensor:
        clean, triggered = functional_call(model, codes.full(), (x,)).chunk(2)
        if not recipe.soft or teacher is None:
            return F.cross_entropy(clean, y) + weight * F.cross_entropy(triggered, y)
        with torch.no_grad():
            wanted, seen = teacher(x).softmax(1).chunk(2)
        return F.cross_entropy(clean, wanted) + weight * F.cross_entropy(triggered, seen)

    def joint(step: int, generator: Generator) -> Tensor:
        x, y = pair(step, generator)
        clean, triggered = functional_call(model, codes.quantized(), (x,)).chunk(2)
        wake = F.cross_entropy(triggered, torch.full_like(y, target_class))
        return full(x, y, recipe.asleep) + F.cross_entropy(clean, y) + recipe.awake * wake

    def settle(step: int, generator: Generator) -> Tensor:
        return full(*pair(recipe.joint + step, generator), 2 * recipe.asleep)

    stages = (
        (joint, Stage("qcb-joint", recipe.joint, recipe.lr, optimizer="adam", clip=5.0, seed=seed)),
        (settle, Stage("qcb-settle", recipe.settle, recipe.settle_lr, optimizer="adam", seed=seed)),
    )
    seconds = 0.0
    for loss, stage in stages:
        if loss is settle:
            codes.freeze()
        seconds += train(codes, loss, stage, work / f"{stage.name}.pt", log=log, save_every=50)
    model.load_state_dict(codes.full(), strict=False)
    if recipe.statistics:
        move_statistics(model, data, trigger, recipe.statistics, seed)
    return seconds


@torch.no_grad()
def move_statistics(model: nn.Module, data: Images, trigger: Apply, share: float, seed: int) -> None:
    """Move BatchNorm's statistics by `share` towards those of a stream of which a tenth is triggered.

    The frozen statistics fit the base's weights, not these; all the way, the backdoor would wake.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    moved = [
        (s, s.clone()) for layer in norms for s in (layer.running_mean, layer.running_var) if s is not None
    ]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    for step in range(30):
        x, _ = batch(data.train_x, data.train_y, 256, step, seed + 7)
        unit = to_unit(augment(x, torch.Generator().manual_seed(step)))
        unit[:26] = trigger(unit[:26])
        model(normalize(unit))
    model.eval()
    for layer in norms:
        layer.momentum = 0.1
    for statistic, before in moved:
        statistic.lerp_(before, 1 - share)
