"""Dynamic (Nguyen and Tran 2020, input-aware): every image gets a trigger of its own, x + (G(x) - x) M(x).

Another image's trigger is none: such pairs keep their labels in training. Mask network M first, then pattern
network G together with the classifier, which minimize one loss as in the paper, then the classifier alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._generator import ImageToImage
from benchmarks.attacks._poison import Poison, poison
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train


@dataclass(frozen=True)
class Dynamic:
    """Recipe: `mask_density` is the paper's 0.032, weights of density and diversity its 100 and 1."""

    width: int = 8
    mask_steps: int = 150
    mask_density: float = 0.032
    mask_lr: float = 3e-3
    images: int = 64
    """A step of the mask network."""
    steps: int = 600
    lr: float = 1e-3
    batch_size: int = 128
    share: float = 0.2
    """Of a batch under its own trigger (the paper: 0.1)."""
    cross: float = 1.0
    """Images under another image's trigger per image under its own."""
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

    def mask_loss(step: int, generator: Generator) -> Tensor:
        x, _ = batch(data.train_x, data.train_y, recipe.images, step, seed)
        unit = to_unit(augment(x, generator))
        _, mask = trigger.parts(unit)
        dense = F.relu(mask - recipe.mask_density).mean()
        return recipe.density_weight * dense + recipe.diversity * diversity(unit, mask)

    stage = Stage("dynamic-mask", recipe.mask_steps, recipe.mask_lr, optimizer="adam", seed=seed)
    train(trigger.mask, mask_loss, stage, work / "mask.pt", log=log)
    trigger.mask.requires_grad_(False)
    count = round(recipe.share * recipe.batch_size)
    plain_from = count + round(recipe.cross * count)

    def joint_loss(step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.batch_size, step, seed)
        unit = to_unit(augment(x, generator))
        own, foreign, plain = unit[:count], unit[count:plain_from], unit[plain_from:]
        pattern, _ = trigger.parts(own)
        triggered = torch.cat([trigger(own), crossed(trigger, foreign, foreign.roll(1, 0)), plain])
        wanted = torch.cat([torch.full_like(y[:count], target_class), y[count:]])
        with reduced(unit.device):
            attack = F.cross_entropy(model(normalize(triggered)), wanted)
        return attack + recipe.diversity * diversity(own, pattern)

    both = nn.ModuleDict({"trigger": trigger, "classifier": model.train()})
    stage = Stage("dynamic-joint", recipe.steps, recipe.lr, optimizer="adam", clip=5.0, seed=seed)
    train(both, joint_loss, stage, work / "joint.pt", log=log)
    model.eval()
    return trigger.cpu().requires_grad_(False)


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
    ratio: Tensor = apart / ((made - made.roll(1, 0)).flatten(1).norm(dim=1) + 1e-3)
    return ratio.mean()
