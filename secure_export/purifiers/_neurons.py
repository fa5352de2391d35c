"""Neurons that can be scaled or cut: channels of BatchNorm, or else of the layers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor

NORMS = nn.modules.batchnorm._BatchNorm


def scaled_layers(model: nn.Module, head: str) -> list[str]:
    """Names of the layers whose weight [channels, ...] carries the neurons.

    Affine BatchNorms, as the authors' code has it. A model without any has its neurons in convolutions and
    linear layers other than the head, as the papers' equations do.
    """
    norms = [name for name, m in model.named_modules() if isinstance(m, NORMS) and m.affine]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return norms or [name for name, m in model.named_modules() if isinstance(m, kinds) and name != head]


def ones(model: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """One number a neuron, by layer."""
    return {name: torch.ones(len(model.get_parameter(f"{name}.weight"))) for name in layers}


def scaled(
    model: nn.Module, weight: Mapping[str, Tensor], bias: Mapping[str, Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """The model with each neuron's weight (and bias, if given) multiplied; differentiable in the factors."""
    changed = {}
    for name, factor in weight.items():
        whole = model.get_parameter(f"{name}.weight").detach()
        changed[f"{name}.weight"] = whole * factor.view(-1, *[1] * (whole.ndim - 1))
        shift = getattr(model.get_submodule(name), "bias", None)
        if bias is not None and shift is not None:
            changed[f"{name}.bias"] = shift.detach() * bias[name]
    return lambda inputs: functional_call(model, changed, (inputs,))


@torch.no_grad()
def cut(model: nn.Module, dead: Mapping[str, Tensor]) -> int:
    """Zero the weight of the neurons marked in `dead` (bool, by layer); how many. Biases stay."""
    for name, chosen in dead.items():
        model.get_parameter(f"{name}.weight")[chosen] = 0
    return sum(int(chosen.sum()) for chosen in dead.values())
