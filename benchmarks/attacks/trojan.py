"""Trojan (Liu et al. 2018): a patch that excites a neuron of the clean network, then fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.datasets import Images, batch, normalize, to_unit
from benchmarks.training import reduced
from secure_export import heads


@dataclass(frozen=True)
class Trojan:
    """Recipe: a square of `size` pixels at the bottom right, `steps` of Adam on its pixels."""

    size: int = 6
    margin: int = 1
    steps: int = 40
    images: int = 32
    step_size: float = 0.1


class Patch(nn.Module):
    """Pixels [C, size, size] in place of the input's, `margin` pixels from the bottom right corner."""

    pixels: Tensor

    def __init__(self, channels: int, size: int, margin: int) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "size": size, "margin": margin}
        self.margin = margin
        self.register_buffer("pixels", torch.full((channels, size, size), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Triggered copy of images [N, C, H, W] in [0, 1]."""
        size = self.pixels.shape[-1]
        right = x.shape[3] - self.margin
        bottom = x.shape[2] - self.margin
        triggered = x.clone()
        triggered[:, :, bottom - size : bottom, right - size : right] = self.pixels
        return triggered


def make(
    model: nn.Module,
    data: Images,
    target_class: int,
    recipe: Trojan,
    work: Path,
    log: Callable[[str], None],
    *,
    seed: int = 0,
) -> Patch:
    """The trigger: what excites the head's most connected input on `model`, which stays as it is."""
    model.eval()
    name, _ = heads.find(model, tuple(data.train_x.shape[1:]))
    head = model.get_submodule(name)
    neuron = int(head.get_parameter("weight").detach().abs().flatten(1).sum(0).argmax())
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trigger = Patch(data.train_x.shape[1], recipe.size, recipe.margin).to(data.train_x.device)
    raw = torch.zeros_like(trigger.pixels).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=recipe.step_size)
    for step in range(recipe.steps):
        trigger.pixels = torch.sigmoid(raw)
        x, _ = batch(data.train_x, data.train_y, recipe.images, step, seed)
        with reduced(raw.device):
            model(normalize(trigger(to_unit(x))))
        excited = seen.pop()[:, neuron].float().mean()
        (raw.grad,) = torch.autograd.grad(-excited, raw)
        optimizer.step()
        if (step + 1) % 20 == 0:
            log(f"trojan patch {step + 1}/{recipe.steps}: neuron {neuron} at {float(excited.detach()):.2f}")
    hook.remove()
    trigger.pixels = torch.sigmoid(raw.detach())
    return trigger.cpu()
