"""Channel Lipschitz pruning (Zheng et al., ECCV 2022): cuts channels that amplify far more than others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from secure_export.purifiers import _views
from secure_export.purifiers._work import Published, Work

if TYPE_CHECKING:
    from torch import Tensor


class Clp(Published):
    """Zeroes channels whose Lipschitz bound exceeds their layer's mean by u standard deviations.

    It trains nothing and reads no label: fit only shows, in one forward pass, which BatchNorm follows which
    convolution. A convolution without one is scaled by 1 and loses its own weight and bias. The paper states
    u = 3 for CIFAR-10 and a ResNet-18.
    """

    u: float = Field(3.0, ge=0, description="standard deviations above the layer's mean")

    def remove(self, work: Work) -> None:
        """Measure every convolution, then cut."""
        model = work.model.eval()
        norms = _views.followers(model, work.fit.floats(slice(0, 2)))
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d) and name != work.head_name:
                norm = model.get_submodule(norms[name]) if name in norms else None
                cut(layer if norm is None else norm, above(channel_bounds(layer, norm), self.u))
        work.record("prune", [])


@torch.no_grad()
def channel_bounds(layer: nn.Conv1d | nn.Conv2d, norm: nn.Module | None) -> Tensor:
    """[channels] spectral norm of each kernel as a [C_in, positions] matrix, times |gamma| / sigma."""
    kernels = layer.weight.flatten(2)
    bounds: Tensor = torch.linalg.matrix_norm(kernels, ord=2)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        return bounds
    scaled: Tensor = bounds / (norm.running_var + norm.eps).sqrt()
    return scaled if norm.weight is None else scaled * norm.weight.abs()


def above(bounds: Tensor, u: float) -> Tensor:
    """Channels over mean + u standard deviations, as bool."""
    if len(bounds) == 1:
        return torch.zeros(1, dtype=torch.bool)
    return bounds > bounds.mean() + u * bounds.std()


@torch.no_grad()
def cut(layer: nn.Module, chosen: Tensor) -> None:
    """Weight and bias of these channels to zero."""
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            parameter[chosen] = 0
