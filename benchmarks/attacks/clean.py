"""No attack: the network that every attack starts from, and the control of every experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, train


@dataclass(frozen=True)
class Clean:
    """Recipe: one-cycle learning rate up to `lr`, then a gentler one; label smoothing, crop and flip."""

    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.15
    polish: int = 6
    """Epochs of the second cycle: eight alone end below 85 %."""
    polish_lr: float = 0.08
    weight_decay: float = 5e-4
    smoothing: float = 0.05


def clean(
    model: nn.Module,
    data: Images,
    recipe: Clean,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
    at_epoch: Callable[[int], None] | None = None,
) -> float:
    """Train `model` in place with cross-entropy; returns seconds."""
    per_epoch = len(data.train_x) // recipe.batch_size

    def loss(order: int, step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.batch_size, step, order)
        logits = model(normalize(to_unit(augment(x, generator))))
        return F.cross_entropy(logits, y, label_smoothing=recipe.smoothing)

    def report(step: int) -> None:
        if at_epoch is not None and step % per_epoch == 0:
            model.eval()
            at_epoch(step // per_epoch)
            model.train()

    model.train()
    cycles = (
        Stage("clean", recipe.epochs * per_epoch, recipe.lr, warmup=0.2, seed=seed),
        Stage("clean-polish", recipe.polish * per_epoch, recipe.polish_lr, warmup=0.05, seed=seed + 1),
    )
    seconds = 0.0
    for cycle in cycles:
        stage = replace(cycle, weight_decay=recipe.weight_decay)
        path = work / f"{stage.name}.pt"
        seconds += train(
            model, partial(loss, stage.seed), stage, path, log=log, save_every=per_epoch // 3, at_save=report
        )
    model.eval()
    return seconds
