"""What torch-pruning would remove from a model: the channels themselves, or zeros in their place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from secure_export import channels

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["group-l1", "own-l1"]
"""L1 norm of all weights that read or write a channel, or of its own filter alone."""
UNFOLLOWABLE = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What torch-pruning raises on a graph whose dependencies it misreads; it has no exception of its own."""


def pruner(
    model: nn.Module,
    head: str,
    example: Tensor,
    ratio: float,
    importance: Importance,
    global_pruning: bool = False,
) -> Any:
    """torch-pruning's own pruner; its `step()` removes the channels, `step(interactive=True)` lists them."""
    import torch_pruning as tp  # 13 s

    own = importance == "own-l1"
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(
            p=1, group_reduction="first" if own else "mean", normalizer=None if own else "mean"
        ),
        global_pruning=global_pruning,
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(head)],
        num_heads={attention.qkv: attention.num_heads for attention in channels.attentions(model)},
    )


def zeroed(
    model: nn.Module, head: str, example: Tensor, ratio: float, importance: Importance
) -> dict[str, Tensor]:
    """Parameters with zeros at the channels that torch-pruning would remove, by name; differentiable.

    A removed channel takes its BatchNorm scale and shift along; what reads it then reads zeros. `example` is
    one raw input [1, ...]. The same function as the pruned network in convolutional networks; LayerNorm would
    see the zeros.
    """
    names = {layer: name for name, layer in model.named_modules()}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    weights: dict[str, Tensor] = {}
    for layer, cut in removed(model, head, example, ratio, importance):
        if isinstance(layer, kinds):
            for kind, values in layer.named_parameters():
                weights[f"{names[layer]}.{kind}"] = without(values, cut)
    return weights


def removed(
    model: nn.Module, head: str, example: Tensor, ratio: float, importance: Importance
) -> list[tuple[nn.Module, Tensor]]:
    """Layers of `model`, and the indices of the outputs that torch-pruning would remove from each.

    Raises one of UNFOLLOWABLE where it cannot follow the model.
    """
    # torch-pruning follows autograd's graph: parameters that need no gradient are silently left as they are.
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = pruner(model, head, example, ratio, importance).step(interactive=True)
            return [
                (dependency.target.module, torch.tensor(cut))
                for group in groups
                for dependency, cut in group
                if "out_channels" in dependency.handler.__name__
            ]
    finally:
        for parameter, before in needed.items():
            parameter.requires_grad_(before)


def without(values: Tensor, cut: Tensor) -> Tensor:
    """`values` [n, ...] with zeros at the indices `cut`."""
    keep = torch.ones(len(values), device=values.device)
    keep[cut.to(values.device)] = 0
    return values * keep.view(-1, *[1] * (values.dim() - 1))
