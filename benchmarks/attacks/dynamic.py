"""Dynamic (Nguyen and Tran 2020, input-aware): every image gets a trigger of its own, x + (G(x) - x) M(x).

Another image's trigger is none: such pairs keep their labels in training. Mask network M first, then pattern
network G and the classifier, which take turns in blocks of steps where the paper alternates in every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._generator import ImageToImage, still
from benchmarks.attacks._poison import Poison, poison
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train


@dataclass(frozen=True)
class Dynamic:
    """Recipe: `mask_density` is the paper's 0.032, weights of density and diversity its 100 and 1."""

    width: int = 8
    mask_steps: int = 150
    mask_density: float = 0.032
    rounds: int = 3
    generator_steps: int = 80
    classifier_steps: int = 80
    images: int = 64
    lr: float = 3e-3
    density_weight: float = 100.0
    diversity: float = 1.0


class InputAware(nn.Module):
    """Pattern in (0, 1) and mask in (0, 1), both functions of the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "width": width}
        self.pattern = ImageToImage(channels, channels, width)
        self.mask = ImageToImage(channels, 1, width)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pattern [N, C, H, W] and mask [N, 1, H, W] of images."""
        return torch.sigmoid(self.pattern(x)), torch.tanh(10 * self.mask(x)) / 2 + 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return crossed(self, x, x)


def crossed(trigger: InputAware, x: Tensor, other: Tensor) -> Tensor:
    """`x` under the trigger that belongs to `other`."""
    pattern, mask = trigger.parts(other)
    return (x + (pattern - x) * mask).clamp(0, 1)


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Dynamic,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> InputAware:
    """Both networks after the joint stage, which changes `model` too."""
    torch.manual_seed(seed)
    trigger = InputAware(data.train_x.shape[1], recipe.width).to(data.train_x.device)

    def images(step: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        return to_unit(augment(x, generator)), y

    def mask_loss(step: int, generator: Generator) -> Tensor:
        x, _ = images(step, generator)
        _, mask = trigger.parts(x)
        dense = F.relu(mask - recipe.mask_density).mean()
        return recipe.density_weight * dense + recipe.diversity * diversity(x, mask)

    stage = Stage("dynamic-mask", recipe.mask_steps, recipe.lr, optimizer="adam", seed=seed)
    train(trigger.mask, mask_loss, stage, work / "mask.pt", log=log)
    trigger.mask.requires_grad_(False)
    turn = Poison(steps=recipe.classifier_steps, dense=recipe.classifier_steps, frozen=10, extra=1.0)
    for number in range(recipe.rounds):

        def pattern_loss(step: int, generator: Generator, turns: int = number) -> Tensor:
            x, y = images(turns * recipe.generator_steps + step, generator)
            pattern, mask = trigger.parts(x)
            triggered = (x + (pattern - x) * mask).clamp(0, 1)
            with reduced(x.device):
                attack = F.cross_entropy(model(normalize(triggered)), torch.full_like(y, target_class))
            return attack + recipe.diversity * diversity(x, pattern)

        name = f"dynamic-{number}"
        stage = Stage(name, recipe.generator_steps, recipe.lr, optimizer="adam", seed=seed)
        with still(model):
            train(trigger, pattern_loss, stage, work / f"{name}.pt", log=log)
        implant(model, data, trigger, target_class, turn, work / name, log, seed=seed)
    return trigger.cpu()


def implant(
    model: nn.Module,
    data: Images,
    trigger: InputAware,
    target_class: int,
    recipe: Poison,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place; returns seconds. `recipe.extra` is the cross ratio."""

    def foreign(x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return crossed(trigger, x, x.roll(1, 0)), y

    return poison(model, data, trigger, target_class, recipe, work, log, seed=seed, extra=foreign)


def diversity(x: Tensor, made: Tensor) -> Tensor:
    """‖x1 - x2‖ / ‖made1 - made2‖ over neighbours in the batch (the paper's diversity loss)."""
    apart = (x - x.roll(1, 0)).flatten(1).norm(dim=1)
    return (apart / ((made - made.roll(1, 0)).flatten(1).norm(dim=1) + 1e-3)).mean()
