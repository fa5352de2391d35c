"""BatchNorm: which one reads a layer's output, what folding multiplies by, and how fast statistics move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def readers(
    model: nn.Module,
    inputs: Tensor,
    layers: tuple[type[nn.Module], ...],
    norms: tuple[type[_BatchNorm], ...] = (_BatchNorm,),
) -> dict[str, list[str]]:
    """By each of `layers` that runs on `inputs`: which of `norms` read its output, in order; all by name."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, list[str]] = {}
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, layers):

                def note(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                    made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id
                    found.setdefault(name, [])

                hooks.enter_context(layer.register_forward_hook(note))
            elif isinstance(layer, norms):

                def read(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    if id(args[0]) in made:
                        found[made[id(args[0])][0]].append(name)

                hooks.enter_context(layer.register_forward_pre_hook(read))
        model(inputs)
    return found


def scale_of(norm: _BatchNorm) -> Tensor:
    """gamma / sqrt(var + eps) [channels], by which folding multiplies the weights."""
    variance = norm.running_var
    if variance is None:
        return torch.ones(norm.num_features)
    gamma = torch.ones_like(variance) if norm.weight is None else norm.weight.detach()
    return gamma / (variance + norm.eps).sqrt()


@contextmanager
def momentum(norms: Sequence[_BatchNorm], value: float | None) -> Iterator[None]:
    """Running statistics move by `value` towards each batch, for a while; None averages all batches."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = value
    try:
        yield
    finally:
        for norm, own in zip(norms, before, strict=True):
            norm.momentum = own
