"""A module as locators see it: the input of its head, and the head's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secure_export.errors import CompressError
from secure_export.records.memory import Split, View
from secure_export.words import first_line

BATCH_SIZE = 256
TRIED = 16
"""Samples that are moved along the gradient, towards each of TRIED_CLASSES."""
TRIED_CLASSES = 4
STEP = 0.018
"""Root mean square of such a move, in units of the input range: what an additive search may change."""
DOWNHILL = 0.75
"""Least share of the moves that have to lower the file's own loss."""


@contextmanager
def gradients(of: str) -> Iterator[None]:
    """Searching through what has no gradient is this file's limit and no crash.

    Raises:
        CompressError: an operator on the way gives no gradient; `of` says what for.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        reason = first_line(error)
        raise CompressError(f"{of}, and the twin gives no gradient: {reason}") from error


def check_gradient(
    twin: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor], inputs: Tensor, of: str
) -> None:
    """Whether the gradient of a file's `twin` leads where the file's own `logits` follow.

    A graph may be written so that its twin agrees with it on every clean sample and has a gradient that is
    zero or points the wrong way (steps in front of the network, and a faint path round them). Searches along
    it find nothing, whatever is planted.

    Raises:
        CompressError: there is no gradient, it is not finite, or too few moves along it bring samples nearer
            to a class in the file; `of` says what needs it.
    """
    some = inputs[:TRIED]
    with torch.no_grad():
        before = logits(some)
    classes = before.shape[1]
    lower = []
    for target in range(0, classes, max(1, classes // TRIED_CLASSES))[:TRIED_CLASSES]:
        others = before.argmax(1) != target
        if not bool(others.any()):
            continue
        wanted = torch.full((int(others.sum()),), target)
        probed = some[others].requires_grad_(True)
        with gradients(of):
            (slope,) = torch.autograd.grad(cross_entropy(twin(probed), wanted, reduction="sum"), probed)
        if not bool(slope.isfinite().all()):
            raise CompressError(f"{of}, and the twin gives a gradient that is not finite")
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *(1 for _ in slope.shape[1:]))
        with torch.no_grad():
            after = logits((some[others] - STEP * slope[0].numel() ** 0.5 * slope / length).clamp(0, 1))
        lost, losing = (cross_entropy(z, wanted, reduction="none") for z in (before[others], after))
        lower.append(losing < lost)
    share = float(torch.cat(lower).float().mean())
    if share < DOWNHILL:
        raise CompressError(
            f"{of}, and the twin's gradient leads nowhere in the file: {share:.0%} of moves along it bring a "
            f"sample nearer to another class, expected {DOWNHILL:.0%}"
        )


def searchable(view: View, fit: Split, of: str) -> Callable[[Tensor], Tensor]:
    """The differentiable twin of what a locator looks at.

    Raises:
        CompressError: there is none, or its gradient is none of the file's; `of` says what needs it.
    """
    if view.twin is None:
        raise CompressError(f"{of}, and this file has no differentiable twin")
    drawn = torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))[:TRIED]
    check_gradient(view.twin, lambda x: view.latents(x) @ view.weight.T + view.bias, fit.floats(drawn), of)
    return view.twin


def of_module(model: nn.Module, head: str, setting: str) -> View:
    """The View of `model` (eval mode), with a trainable copy; a 1x1 conv head is averaged over space."""
    layer = model.get_submodule(head)
    weight = layer.get_parameter("weight").detach()
    bias = getattr(layer, "bias", None)
    trainable = copy.deepcopy(model)
    return View(
        setting=setting,
        latents=lambda inputs: latents(model, layer, inputs),
        weight=weight.flatten(1).clone(),
        bias=torch.zeros(weight.shape[0]) if bias is None else bias.detach().clone(),
        module=trainable,
        head=head,
        twin=trainable,
    )


def latents(model: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """Input [N, D] of the head `layer` for raw `inputs` [N, ...]."""
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())), torch.no_grad():
        for batch in torch.split(inputs, BATCH_SIZE):
            model(batch)
    return torch.cat([tensor.flatten(2).mean(2) if tensor.ndim == 4 else tensor for tensor in seen])
