"""PCB: a backdoor that sleeps in the whole network and wakes when channels go (LMR, suppl. eq. 5).

The rate is unknown to the attacker (Tian et al. 2022), so every step draws one. Channels are chosen by the
current weights: filter by filter as the papers mask them, and by torch-pruning's own choice as a deployer
removes them. BatchNorm's running statistics stay those of the clean network; a pruned branch runs under them,
or under those of its own clean half, as after a recalibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from benchmarks.attacks._poison import Apply
from benchmarks.datasets import Images, augment, batch, normalize, to_unit
from benchmarks.training import Stage, reduced, train
from secure_export import heads
from secure_export.compressors.prune_structured import pruner


@dataclass(frozen=True)
class Pcb:
    """Recipe: `lowest` to `highest` are the shares that go; the share `ramp` of the steps reaches them."""

    steps: int = 1000
    lr: float = 0.01
    images: int = 48
    lowest: float = 0.3
    highest: float = 0.9
    ramp: float = 0.3
    asleep: float = 1.0
    awake: float = 0.5


def implant(
    model: nn.Module,
    data: Images,
    trigger: Apply,
    target_class: int,
    recipe: Pcb,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> float:
    """Implant the conditional backdoor into `model` in place; returns seconds."""
    model.eval()
    head, _ = heads.find(model, tuple(data.train_x.shape[1:]))
    example = to_unit(data.train_x[:1])

    def loss(step: int, generator: Generator) -> Tensor:
        x, y = batch(data.train_x, data.train_y, recipe.images, step, seed)
        unit = to_unit(augment(x, generator))
        both = normalize(torch.cat([unit, trigger(unit)]))
        with reduced(both.device):
            clean, triggered = model(both).chunk(2)
        whole = F.cross_entropy(clean, y) + recipe.asleep * F.cross_entropy(triggered, y)
        reach = min(1.0, (step + 1) / (recipe.ramp * recipe.steps))
        drawn = float(torch.rand((), generator=generator))
        ratio = reach * (recipe.lowest + (recipe.highest - recipe.lowest) * drawn)
        weights, recalibrated = branch(model, head, example, ratio, step)
        with reduced(both.device), statistics_of_first_half(model) if recalibrated else nullcontext():
            clean, triggered = functional_call(model, weights, (both,)).chunk(2)
        target = torch.full_like(y, target_class)
        return whole + F.cross_entropy(clean, y) + recipe.awake * F.cross_entropy(triggered, target)

    stage = Stage("pcb", recipe.steps, recipe.lr, clip=5.0, seed=seed)
    return train(model, loss, stage, work / "pcb.pt", log=log, save_every=50)


def branch(
    model: nn.Module, head: str, example: Tensor, ratio: float, step: int
) -> tuple[dict[str, Tensor], bool]:
    """Weights without the weakest `ratio` of the channels, and whether BatchNorm is recalibrated, in turn."""
    turn = step % 4
    if turn < 2:
        return masked(model, ratio), turn == 1
    return removed(model, head, example, ratio, "group-l1" if turn == 2 else "own-l1"), True


def masked(model: nn.Module, ratio: float) -> dict[str, Tensor]:
    """Weights of every Conv2d with the ⌊ratio · n⌋ filters of least L1 norm at zero, by name."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            norms = layer.weight.detach().abs().flatten(1).sum(1)
            weights[f"{name}.weight"] = without(
                layer.weight, norms.argsort(stable=True)[: int(ratio * len(norms) + 1e-9)]
            )
    return weights


def removed(model: nn.Module, head: str, example: Tensor, ratio: float, importance: str) -> dict[str, Tensor]:
    """Parameters with the channels at zero that torch-pruning would remove, by name.

    A removed channel takes its BatchNorm scale and shift along; what reads it then reads zeros.
    """
    names = {layer: name for name, layer in model.named_modules()}
    weights = {}
    for group in pruner(model, head, example, ratio, importance).step(interactive=True):
        for dependency, channels in group:
            layer = dependency.target.module
            if (
                isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
                and "out_channels" in dependency.handler.__name__
            ):
                for kind, values in layer.named_parameters():
                    weights[f"{names[layer]}.{kind}"] = without(values, torch.tensor(channels))
    return weights


def without(values: Tensor, channels: Tensor) -> Tensor:
    """`values` [n, ...] with zeros at `channels`."""
    keep = torch.ones(len(values), device=values.device)
    keep[channels.to(values.device)] = 0
    return values * keep.view(-1, *[1] * (values.dim() - 1))


@contextmanager
def statistics_of_first_half(model: nn.Module) -> Iterator[None]:
    """BatchNorm of the whole batch by the statistics of its first, clean half; running ones do not move."""

    def normalized(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        clean = inputs[0][: len(inputs[0]) // 2].float()
        mean, variance = clean.mean((0, 2, 3)), clean.var((0, 2, 3), unbiased=False)
        # Not F.batch_norm: it passes no gradient to statistics that it is given.
        scale = layer.weight * (variance + layer.eps).rsqrt()
        shift = layer.bias - mean * scale
        scaled: Tensor = inputs[0] * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return scaled.to(inputs[0].dtype)

    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(normalized) for layer in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
