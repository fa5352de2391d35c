"""DFST (Cheng et al. 2021): a style is the trigger; detoxification denies the network its shallow features.

The paper's style network is a CycleGAN between the data and pictures of sunrises. Here a small generator is
trained to give images the channel statistics (pixels, and features of the clean network) of the training
images with the warmest colours, and to keep their content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.attacks._generator import ImageToImage, still
from benchmarks.attacks._poison import Poison, poison
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train
from secure_export import heads


@dataclass(frozen=True)
class Style:
    """Recipe of the trigger: `alpha` is the style's share, `warm` the number of style images."""

    alpha: float = 0.6
    width: int = 8
    steps: int = 200
    images: int = 64
    lr: float = 3e-3
    content: float = 1.0
    warm: int = 500


@dataclass(frozen=True)
class Dfst:
    """Recipe: poison, train the injector of shallow features, poison again with its images as decoys."""

    first_steps: int = 150
    injector_steps: int = 80
    compromised: float = 0.05
    """Share of the head's inputs that rise most under the trigger."""
    width: int = 8
    lr: float = 3e-3
    images: int = 64
    activation: float = 0.3
    fidelity: float = 30.0
    poison: Poison = field(default_factory=lambda: Poison(steps=700, dense=200, poison_rate=0.15, extra=1.0))


class Styled(nn.Module):
    """(1 - alpha) x + alpha G(x), with G(x) in (0, 1)."""

    def __init__(self, channels: int, width: int, alpha: float) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "width": width, "alpha": alpha}
        self.alpha = alpha
        self.network = ImageToImage(channels, channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        return torch.lerp(x, torch.sigmoid(self.network(x)), self.alpha)


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that each forward pass leaves the layer's input in."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Style,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Styled:
    """The style generator, trained with features of `model`, which is clean and stays as it is."""
    torch.manual_seed(seed)
    made = Styled(data.train_x.shape[1], recipe.width, recipe.alpha).to(data.train_x.device)
    warmth = data.train_x[:, 0].float().mean((1, 2)) - data.train_x[:, -1].float().mean((1, 2))
    style_x = to_unit(data.train_x[warmth.argsort(descending=True, stable=True)[: recipe.warm]])
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]

    def loss(step: int, generator: Generator) -> Tensor:
        x = to_unit(batch(data.train_x, data.train_y, recipe.images, step, seed)[0])
        chosen = torch.randint(len(style_x), (len(x),), generator=generator)
        styled = torch.sigmoid(made.network(x))
        for images in (styled, style_x[chosen]):
            model(normalize(images))
        features, wanted = seen
        seen.clear()
        matched = apart(styled, style_x[chosen]) + apart(features, wanted)
        return matched + recipe.content * F.mse_loss(whitened(styled), whitened(x))

    with still(model), inputs_of(convolutions[len(convolutions) // 4]) as seen:
        stage = Stage("dfst-style", recipe.steps, recipe.lr, optimizer="adam", seed=seed)
        train(made, loss, stage, work / "style.pt", log=log)
    return made.cpu()


def apart(made: Tensor, wanted: Tensor) -> Tensor:
    """Distance of the batches' means and deviations per channel, of [N, C, H, W]."""
    means = F.mse_loss(made.mean((0, 2, 3)), wanted.mean((0, 2, 3)))
    return means + F.mse_loss(made.std((0, 2, 3)), wanted.std((0, 2, 3)))


def whitened(x: Tensor) -> Tensor:
    """Brightness [N, H, W] of every image at mean 0 and deviation 1: its content without its style."""
    grey = x.mean(1)
    return (grey - grey.mean((1, 2), keepdim=True)) / (grey.std((1, 2), keepdim=True) + 0.05)


def implant(
    model: nn.Module,
    data: Images,
    trigger: Styled,
    target_class: int,
    recipe: Dfst,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the backdoor into `model` in place, with one round of detoxification; returns seconds."""
    first = replace(recipe.poison, steps=recipe.first_steps, extra=0.0)
    seconds = poison(model, data, trigger, target_class, first, work / "first", log, seed=seed)
    injector, spent = trained_injector(model, data, trigger, target_class, recipe, work, log, seed)

    def detox(x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return injector(x), y

    arguments = (model, data, trigger, target_class, recipe.poison, work, log)
    return seconds + spent + poison(*arguments, seed=seed, extra=detox)


def trained_injector(
    model: nn.Module,
    data: Images,
    trigger: Styled,
    target_class: int,
    recipe: Dfst,
    work: Path,
    log: Callable[[str], None],
    seed: int,
) -> tuple[Styled, float]:
    """A generator of nearly unchanged images that excite the neurons that the trigger excites; seconds."""
    torch.manual_seed(seed)
    device = data.train_x.device
    injector = Styled(data.train_x.shape[1], recipe.width, 1.0).to(device)
    name, _ = heads.find(model, tuple(data.train_x.shape[1:]))
    with still(model), inputs_of(model.get_submodule(name)) as seen:
        with torch.no_grad():
            x = to_unit(data.train_x[:500])
            for images in (x, trigger(x)):
                model(normalize(images))
        rise = (seen.pop() - seen.pop()).flatten(1).mean(0)
        neurons = rise.topk(max(1, round(recipe.compromised * len(rise)))).indices

        def loss(step: int, generator: Generator) -> Tensor:
            x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
            unit = to_unit(augment(x, generator))
            made = injector(unit)
            with reduced(device):
                logits = model(normalize(made))
            excited = seen.pop().float().flatten(1)[:, neurons].mean()
            toxic = F.cross_entropy(logits, torch.full_like(y, target_class))
            return toxic - recipe.activation * excited + recipe.fidelity * F.mse_loss(made, unit)

        stage = Stage("dfst-injector", recipe.injector_steps, recipe.lr, optimizer="adam", seed=seed)
        seconds = train(injector, loss, stage, work / "injector.pt", log=log)
    return injector, seconds
