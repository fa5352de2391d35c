"""Unstructured pruning: the weights of least magnitude over the whole network become zero."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import recalibrate_batchnorm, weighted_layers
from secure_export.errors import CompressError
from secure_export.records.measured import Change


class PruneUnstructured(ModuleStep):
    """Global L1 magnitude over all Conv2d and Linear weights but the head's; biases stay."""

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the weights to zero")
    recalibrate: bool = Field(True, description="BatchNorm statistics from the calibration split")

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Zero weights of `model` in place; counts those that were not zero before.

        Raises:
            CompressError: the model has no Conv2d or Linear besides its head.
        """
        weights = [layer.weight for _, layer in weighted_layers(model, context.head)]
        if not weights:
            raise CompressError("prune-unstructured: the model has no Conv2d or Linear besides its head")
        changed = zero_smallest(weights, self.ratio)
        if self.recalibrate:
            recalibrate_batchnorm(model, context.calibration)
        total = sum(weight.numel() for weight in weights)
        return model.eval(), Change(self.kind, changed, total, "weights", "global, L1")


@torch.no_grad()
def zero_smallest(weights: list[Tensor], ratio: float) -> int:
    """Zero the ⌊ratio · n⌋ entries of least magnitude over all `weights`, in place; gives how many were not.

    torch.nn.utils.prune does the same but leaves parametrizations behind, and fails on channels-last weights.
    """
    magnitudes = torch.cat([weight.abs().reshape(-1) for weight in weights])
    # A stable order makes ties, and so the exact count, the same on every run.
    pruned = magnitudes.argsort(stable=True)[: int(ratio * len(magnitudes) + 1e-9)]
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[pruned] = False
    sizes = [weight.numel() for weight in weights]
    for weight, mask in zip(weights, torch.split(keep, sizes), strict=True):
        weight.mul_(mask.reshape(weight.shape))
    return int(magnitudes[pruned].count_nonzero())
