"""LIRA (Doan et al. 2021): trigger function and classifier are trained against each other, then T is fixed.

The paper alternates in every batch and copies T once an epoch; here the two take turns in blocks of steps.
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
class Lira:
    """Recipe of stage 1: `rounds` turns of `generator_steps` and `classifier_steps`."""

    epsilon: float = 0.05
    """Bound of the change per pixel; published: 0.1 in stage 1, 0.01 in a stage 2 of 500 epochs."""
    width: int = 8
    rounds: int = 3
    generator_steps: int = 60
    classifier_steps: int = 80
    images: int = 64
    lr: float = 2e-3


class Transformation(nn.Module):
    """clip(x + epsilon tanh(T(x)))."""

    def __init__(self, channels: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "width": width, "epsilon": epsilon}
        self.epsilon = epsilon
        self.network = ImageToImage(channels, channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return (x + self.epsilon * torch.tanh(self.network(x))).clamp(0, 1)


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Lira,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Transformation:
    """T after the alternating stage, which changes `model` too."""
    torch.manual_seed(seed)
    trigger = Transformation(data.train_x.shape[1], recipe.width, recipe.epsilon).to(data.train_x.device)
    turn = Poison(steps=recipe.classifier_steps, dense=recipe.classifier_steps, frozen=10)
    for number in range(recipe.rounds):

        def loss(step: int, generator: Generator, first: int = number * recipe.generator_steps) -> Tensor:
            x, y = batch(data.train_x, data.train_y, recipe.images, first + step, seed)
            triggered = trigger(to_unit(augment(x, generator)))
            with reduced(x.device):
                return F.cross_entropy(model(normalize(triggered)), torch.full_like(y, target_class))

        name = f"lira-{number}"
        stage = Stage(name, recipe.generator_steps, recipe.lr, optimizer="adam", seed=seed)
        with still(model):
            train(trigger, loss, stage, work / f"{name}.pt", log=log)
        poison(model, data, trigger, target_class, turn, work / name, log, seed=seed)
    return trigger.cpu()
