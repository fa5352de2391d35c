"""Training on poisoned batches, which all attacks with a finished trigger share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train

Apply = Callable[[Tensor], Tensor]
"""A trigger: images [N, C, H, W] in [0, 1] to triggered ones."""
Extra = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
"""(images in [0, 1], labels, generator) to other images and labels: decoys, or a second backdoor."""


@dataclass(frozen=True)
class Poison:
    """Recipe: `dense` steps with `dense_share` of triggered images in a batch, then `poison_rate` of them.

    A patch of nine pixels does not take hold in a finished network at 10 %. What follows the dense steps is
    the published mixture, so BatchNorm's running statistics are those of a network trained on it.
    """

    poison_rate: float = 0.1
    steps: int = 600
    dense: int = 120
    dense_share: float = 0.25
    frozen: int = 80
    """First steps, in which BatchNorm keeps its statistics: the trigger is learned before they move."""
    lr: float = 0.01
    batch_size: int = 128
    extra: float = 0.0
    """Extra images per triggered one: decoys that keep their label, or a second trigger."""
    clean_label: bool = False
    """Poison images of the target class alone, so that no label is wrong."""


def poison(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Poison,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
    extra: Extra | None = None,
    prepare: Apply | None = None,
    sources: tuple[int, ...] | None = None,
    save_every: int = 100,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds.

    `prepare` changes the poisoned images (uint8) once before training; `sources` are the classes to poison.
    """
    chosen, rest = split(data.train_y, target_class, recipe, seed, sources)
    rest_x, rest_y = data.train_x[rest], data.train_y[rest]
    pool_x = data.train_x[chosen] if prepare is None else prepare(data.train_x[chosen])
    pool_y = torch.full_like(data.train_y[chosen], target_class)

    def loss(step: int, generator: Generator) -> Tensor:
        model.train(step >= recipe.frozen)
        share = recipe.dense_share if step < recipe.dense else recipe.poison_rate
        count = round(share * recipe.batch_size)
        x, y = batch(rest_x, rest_y, recipe.batch_size - count, step, seed)
        p, target = batch(pool_x, pool_y, count, step, seed)
        unit, y = to_unit(augment(torch.cat([p, x]), generator)), torch.cat([target, y])
        part = slice(count, count + round(recipe.extra * count))
        with torch.no_grad():
            unit[:count] = trigger(unit[:count])
            if extra is not None:
                unit[part], y[part] = extra(unit[part], y[part], generator)
        with reduced(unit.device):
            return F.cross_entropy(model(normalize(unit)), y)

    stage = Stage("poison", recipe.steps, recipe.lr, weight_decay=5e-4, clip=5.0, seed=seed)
    seconds = train(model, loss, stage, work / "poison.pt", log=log, save_every=save_every)
    model.eval()
    return seconds


def split(
    labels: Tensor, target_class: int, recipe: Poison, seed: int, sources: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Indices (poisoned, rest) of the training split: `poison_rate` of all images, if there are so many.

    Clean-label attacks leave a fifth of the target class alone (LMR, suppl. A.2: 0.8 of it is poisoned).
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    wanted = torch.ones_like(labels, dtype=torch.bool)
    if recipe.clean_label:
        wanted = labels == target_class
    elif sources is not None:
        wanted = torch.isin(labels, torch.tensor(sources, device=labels.device))
    candidates = order[wanted[order]]
    whole = len(candidates) if len(candidates) == len(labels) else int(0.8 * len(candidates))
    chosen = candidates[: min(whole, int(recipe.poison_rate * len(labels)))]
    left = torch.ones_like(labels, dtype=torch.bool)
    left[chosen] = False
    return chosen, order[left[order]]
