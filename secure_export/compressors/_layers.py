"""What pruning steps share: which layers may lose channels, and BatchNorm statistics for what is left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secure_export import batchnorms
from secure_export.errors import CompressError
from secure_export.records.memory import Split

BATCH_SIZE = 128


def weighted_layers(model: nn.Module, head: str) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """(qualified name, layer) of every Conv2d and Linear but the head, in the model's order.

    Raises:
        CompressError: a layer's weight is quantized already.
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != head
    ]
    for name, layer in found:
        if type(layer.weight) is not nn.Parameter:
            raise CompressError(
                f"{name} holds a {type(layer.weight).__name__}, expected plain weights",
                hint="prune and recover before quantizing",
            )
    return found


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, calibration: Split) -> int:
    """Replace every BatchNorm's running statistics by those of the calibration split; gives their number.

    Statistics are averaged over batches of nearly equal size, each counting the same. Everything else stays
    in eval mode, so dropout does not disturb them. Without this a pruned network keeps the statistics of the
    channels that fed it before, and its accuracy collapses whatever was pruned.

    Raises:
        CompressError: the model has a BatchNorm, and the split fewer than two samples.
    """
    norms = [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    if not norms:
        return 0
    if len(calibration) < 2:
        raise CompressError(
            f"BatchNorm statistics need at least 2 calibration samples, got {len(calibration)}"
        )
    model.eval()
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
    with batchnorms.momentum(norms, None):
        for index in torch.arange(len(calibration)).tensor_split(-(-len(calibration) // BATCH_SIZE)):
            model(calibration.floats(index))
    model.eval()
    return len(norms)


def pruned_masks(model: nn.Module) -> dict[str, Tensor]:
    """By the name of a parameter, what of it must stay zero: pruned weights, and what a purifier has cut from
    the head. The bias of a filter that is zero altogether stays zero with it.
    """
    masks: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            alive = layer.weight.detach() != 0
            if not alive.all():
                masks[f"{name}.weight"] = alive
                if layer.bias is not None:
                    masks[f"{name}.bias"] = alive.flatten(1).any(1) | (layer.bias.detach() != 0)
    return masks


@torch.no_grad()
def keep_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero again what training has brought back; `masks` as from `pruned_masks`."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
