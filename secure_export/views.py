"""A module as locators see it: the input of its head, and the head's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secure_export.errors import CompressError
from secure_export.records.memory import View

BATCH_SIZE = 256


@contextmanager
def gradients(of: str) -> Iterator[None]:
    """Searching through what has no gradient is this file's limit and no crash.

    Raises:
        CompressError: an operator on the way gives no gradient; `of` says what for.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CompressError(f"{of}, and the twin gives no gradient: {reason}") from error


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
