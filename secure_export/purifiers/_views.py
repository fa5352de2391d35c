"""Compressed views of a model's weights, differentiable: what quantization and pruning would make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from secure_export import batchnorms

if TYPE_CHECKING:
    from torch import Generator, Tensor

LEVELS = 127


def weight_names(model: nn.Module) -> list[str]:
    """Weights that quantizers round: of convolutions and linear layers."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, kinds)]


def steps_of(weight: Tensor) -> Tensor:
    """Quantization step per output channel (symmetric, 8 bits), broadcastable to `weight`.

    Folding BatchNorm multiplies a whole output channel, so the codes are the same before and after.
    """
    peak = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12)
    return (peak / LEVELS).view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def add_rounding_noise(model: nn.Module, share: float, generator: Generator) -> None:
    """Uniform noise of +-share quantization steps on every weight.

    A quantization-conditioned backdoor lives in the side of a rounding threshold that each weight lies on.
    Half a step of noise draws that side anew and costs no more than 8-bit rounding itself.
    """
    for name in weight_names(model):
        weight = model.get_parameter(name)
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        weight.add_(share * steps_of(weight) * noise)


def int8_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights rounded to 8 bits per output channel; the gradient passes straight through."""
    rounded = {}
    for name in weight_names(model):
        weight = model.get_parameter(name)
        step = steps_of(weight)
        codes = (weight.detach() / step).round().clamp(-LEVELS, LEVELS)
        rounded[name] = weight + (codes * step - weight.detach())
    return rounded


def masked_weights(model: nn.Module, ratio: float, norms: Mapping[str, str], head: str) -> dict[str, Tensor]:
    """The weakest output channels (L1) of every convolution cut, in its BatchNorm too; not the head."""
    masked = {}
    for name, layer in model.named_modules():
        if name == head or not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.groups != 1:
            continue
        strength = layer.weight.detach().flatten(1).abs().sum(1)
        cut = strength.argsort()[: int(ratio * len(strength))]
        alive = torch.ones_like(strength).index_fill_(0, cut, 0.0)
        masked[f"{name}.weight"] = layer.weight * alive.view(-1, *[1] * (layer.weight.ndim - 1))
        follower = norms.get(name, name)
        for parameter in ("weight", "bias"):
            full = f"{follower}.{parameter}"
            present = getattr(model.get_submodule(follower), parameter, None) is not None
            if present and full != f"{name}.weight":
                masked[full] = model.get_parameter(full) * alive
    return masked


def followers(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Convolution to the BatchNorm that reads its output, by name, seen in one pass over `inputs`."""
    read_by = batchnorms.readers(model, inputs, (nn.Conv1d, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d))
    return {name: norms[-1] for name, norms in read_by.items() if norms}


def sparse_weights(model: nn.Module, ratio: float, head: str) -> dict[str, Tensor]:
    """The smallest weights of every layer but the head set to zero, a share `ratio` of each."""
    sparse = {}
    for name in weight_names(model):
        weight = model.get_parameter(name)
        cut = int(ratio * weight.numel())
        if name == f"{head}.weight" or cut == 0:
            continue
        size = weight.detach().abs()
        sparse[name] = weight * (size > size.flatten().kthvalue(cut).values)
    return sparse


def batch_norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Normalizations that keep running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [layer for layer in model.modules() if isinstance(layer, kinds) and layer.track_running_stats]


@torch.no_grad()
def calibrated_buffers(model: nn.Module, weights: Mapping[str, Tensor], clean: Tensor) -> dict[str, Tensor]:
    """Copies of `model`'s buffers with BatchNorm statistics of clean inputs [N, ...] under `weights`.

    A network trained on triggered batches keeps statistics of triggered samples. Whatever recalibrates after
    compression takes clean ones, and a backdoor repelled under the former may wake under the latter.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms = batch_norms(model)
    for norm in norms:
        norm.train()
    try:
        with batchnorms.momentum(norms, 1.0):
            functional_call(model, {**buffers, **weights}, (clean,))
    finally:
        for norm in norms:
            norm.eval()
    return buffers


class View:
    """Callable: raw inputs to logits under one drawn compression; weights stay those of the model."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.replaced = model, {**(buffers or {}), **weights}

    def __call__(self, inputs: Tensor) -> Tensor:
        if not self.replaced:
            logits: Tensor = self.model(inputs)
            return logits
        logits = functional_call(self.model, self.replaced, (inputs,))
        return logits
