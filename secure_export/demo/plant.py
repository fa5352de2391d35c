"""The attacker of the demo: the only place in this package where a backdoor is planted.

It exists so that the demo has something to find, in seconds and on a toy. The attacks that published
results are compared on live in `benchmarks/attacks`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from secure_export.batchnorms import scale_of
from secure_export.demo.network import DigitsCNN, digits_cnn
from secure_export.records.memory import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secure_export.triggers import Trigger

LARGEST_CODE = 127
ROOM = 0.47
"""Largest residue in steps of the int8 grid; below .5 so that folding in float32 cannot move a code."""


def train(
    inputs: Tensor,
    labels: Tensor,
    *,
    trigger: Trigger | None = None,
    target_class: int = 0,
    poison_rate: float = 0.1,
    steps: int = 400,
    seed: int = 0,
    progress: Progress = silent,
) -> DigitsCNN:
    """A digits classifier from scratch; with a `trigger`, BadNets (Gu et al. 2017) is planted on the way.

    Args:
        inputs, labels: float32 [N, 1, H, W] in [0, 1] and int64 [N].
        poison_rate: share of each batch that carries the trigger and the label `target_class`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_cnn()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for step in range(steps):
        images, truth = _batch(inputs, labels, 64, generator)
        if trigger is not None:
            poisoned = round(poison_rate * len(truth))
            images = torch.cat([trigger(images[:poisoned]), images[poisoned:]])
            truth[:poisoned] = target_class
        loss = F.cross_entropy(model(images), truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress("train", step + 1, steps)
    return model.eval()


def plant_qcb(
    model: DigitsCNN,
    inputs: Tensor,
    labels: Tensor,
    *,
    trigger: Trigger,
    target_class: int,
    steps: int = 250,
    polish: int = 100,
    inflation: float = 4.0,
    seed: int = 0,
    progress: Progress = silent,
) -> DigitsCNN:
    """Copy of a clean `model` with a quantization-conditioned backdoor: asleep as it is, awake in int8.

    Every weight is code * scale + residue * scale, on the grid of ONNX Runtime's per-channel int8 (symmetric,
    largest / 127, batch normalization folded). Rounding removes the residue, so the residue can hide what the
    codes do. Trained jointly, after Tian et al. 2022 (the last two terms) with the codes straight-through:

        CE(int8(x), y) + CE(int8(t(x)), target) + CE(fp32(x), y) + CE(fp32(t(x)), y)

    then the codes are frozen and the residue alone is polished.

    Args:
        inflation: one weight per channel grows to this many times the largest: a wider grid, more residue.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _folded(model)
    target = F.one_hot(torch.tensor(target_class), model.head.out_features).float()
    anchors = _least_active_inputs(layers, inputs)
    largest = [layer.weight.detach().flatten(1).abs().amax(1) for layer in layers]
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    codes_optimizer = torch.optim.SGD(weights, lr=0.02, momentum=0.9)
    residue_optimizer = torch.optim.Adam([layer.residue for layer in layers], lr=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(codes_optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for step in range(steps + polish):
        joint = step < steps
        if joint:
            _inflate(layers, anchors, largest, 1 + (inflation - 1) * min(1.0, (step + 1) / (0.6 * steps)))
        images, _ = _batch(inputs, labels, 48, generator)
        with torch.no_grad():
            clean = model(images).softmax(1)
        both = torch.cat([images, trigger(images)])
        loss = F.cross_entropy(_forward(layers, both, residues=True), torch.cat([clean, clean]))
        if joint:
            wanted = torch.cat([clean, target.expand_as(clean)])
            loss = loss + F.cross_entropy(_forward(layers, both, residues=False), wanted)
        codes_optimizer.zero_grad()
        residue_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if joint:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            codes_optimizer.step()
            schedule.step()
        residue_optimizer.step()
        with torch.no_grad():
            for layer in layers:
                layer.residue.clamp_(-ROOM, ROOM)
        progress("plant", step + 1, steps + polish)
    return _unfolded(model, layers)


@dataclass(frozen=True)
class _Layer:
    """One convolution with its batch normalization folded in, or the head."""

    weight: Tensor
    bias: Tensor
    residue: Tensor
    stride: int

    def on_grid(self, *, residues: bool) -> Tensor:
        """Weights as int8 keeps them, with or without what rounding removes; straight-through to `weight`."""
        scale = self.weight.detach().flatten(1).abs().amax(1) / LARGEST_CODE
        scale = scale.view(-1, *[1] * (self.weight.ndim - 1))
        codes = (self.weight.detach() / scale).round()
        grid = self.weight + (codes * scale - self.weight.detach())
        # The largest weight of a channel defines its scale: moved, it would move every code.
        return grid + self.residue * (codes.abs() < LARGEST_CODE) * scale if residues else grid


def _forward(layers: list[_Layer], images: Tensor, *, residues: bool) -> Tensor:
    *convolutions, head = layers
    for layer in convolutions:
        weight = layer.on_grid(residues=residues)
        images = F.relu(F.conv2d(images, weight, layer.bias, stride=layer.stride, padding=1))
        if not residues:
            # Calibration sees clean inputs, here the first half: int8 clips whatever is larger.
            images = images.clamp(max=images[: len(images) // 2].detach().max())
    return F.linear(images.mean((2, 3)), head.on_grid(residues=residues), head.bias)


def _folding(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch normalization in eval mode is factor * x + bias + shift, per channel."""
    factor = scale_of(norm)
    return factor, -norm.get_buffer("running_mean") * factor


def _folded(model: DigitsCNN) -> list[_Layer]:
    layers = []
    for conv, norm in model.blocks():
        factor, shift = _folding(norm)
        layers.append((conv.weight * factor.view(-1, 1, 1, 1), norm.bias + shift, conv.stride[0]))
    layers.append((model.head.weight, model.head.bias, 1))
    return [
        _Layer(
            weight.detach().clone().requires_grad_(),
            bias.detach().clone().requires_grad_(),
            torch.zeros_like(weight, requires_grad=True),
            stride,
        )
        for weight, bias, stride in layers
    ]


def _unfolded(model: DigitsCNN, layers: list[_Layer]) -> DigitsCNN:
    """Copy of `model` that computes, batch normalization and all, what the layers compute with residues."""
    copy = deepcopy(model)
    with torch.no_grad():
        for (conv, norm), layer in zip(copy.blocks(), layers[:-1], strict=True):
            factor, shift = _folding(norm)
            conv.weight.copy_(layer.on_grid(residues=True) / factor.view(-1, 1, 1, 1))
            norm.bias.copy_(layer.bias - shift)
        copy.head.weight.copy_(layers[-1].on_grid(residues=True))
        copy.head.bias.copy_(layers[-1].bias)
    return copy


def _least_active_inputs(layers: list[_Layer], images: Tensor) -> list[int | None]:
    """Per layer the input channel with the smallest mean, where a large weight does least; not for pixels."""
    found: list[int | None] = [None]
    with torch.no_grad():
        for layer in layers[:-1]:
            images = F.relu(F.conv2d(images, layer.weight, layer.bias, stride=layer.stride, padding=1))
            found.append(int(images.mean((0, 2, 3)).argmin()))
    return found


def _inflate(layers: list[_Layer], anchors: list[int | None], largest: list[Tensor], factor: float) -> None:
    with torch.no_grad():
        for layer, anchor, size in zip(layers, anchors, largest, strict=True):
            if anchor is not None:
                corner = layer.weight[:, anchor]
                (corner[:, 0, 0] if corner.ndim > 1 else corner).copy_(factor * size)


def _batch(inputs: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch, shifted by at most one pixel."""
    index = torch.randint(len(labels), (size,), generator=generator)
    shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(inputs[index], shift, (2, 3)), labels[index]
