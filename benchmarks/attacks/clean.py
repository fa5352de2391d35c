"""No attack: the network that every attack starts from, and the control of every experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train


@dataclass(frozen=True)
class Clean:
    """Recipe: one cycle of the learning rate, label smoothing, crop and flip; forward passes in bfloat16."""

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.2
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
) -> float:
    """Train `model` in place with cross-entropy; returns seconds."""
    per_epoch = len(data.train_x) // recipe.batch_size

    def loss(step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.batch_size, step, seed)
        unit = to_unit(augment(x, generator))
        with reduced(unit.device):
            return F.cross_entropy(model(normalize(unit)), y, label_smoothing=recipe.smoothing)

    model.train()
    stage = Stage(
        "clean",
        recipe.epochs * per_epoch,
        recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup=0.2,
        seed=seed,
    )
    seconds = train(model, loss, stage, work / "clean.pt", log=log, save_every=per_epoch // 3)
    model.eval()
    return seconds
