"""Channel masks: in every convolution, the filters with the least L1 norm are zeroed.

Nothing gets smaller; this is how Tian et al. 2022 train pruning-conditioned backdoors and how LMR measures
them, so their numbers compare with this step only.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import recalibrate_batchnorm, weighted_layers
from secure_export.errors import CompressError
from secure_export.records.measured import Change


class PruneChannelMask(ModuleStep):
    """Per layer, L1 norm, output channels of Conv2d; the BatchNorm behind a masked filter stays alive.

    The papers keep BatchNorm's old statistics (`recalibrate: false`). Here the default is to recalibrate:
    with old statistics an ordinary network collapses at a ratio of .3, and then says nothing of a backdoor.
    """

    ratio: float = Field(0.5, gt=0, lt=1, description="share of each convolution's filters to zero")
    recalibrate: bool = Field(True, description="BatchNorm statistics from the calibration split")

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Zero filters of `model` in place; counts channels that were alive and are not.

        Raises:
            CompressError: the model has no Conv2d besides its head.
        """
        layers = [layer for _, layer in weighted_layers(model, context.head) if isinstance(layer, nn.Conv2d)]
        if not layers:
            raise CompressError("prune-channel-mask: the model has no Conv2d besides its head")
        changed = sum(mask_filters(layer, self.ratio) for layer in layers)
        if self.recalibrate:
            recalibrate_batchnorm(model, context.calibration)
        total = sum(layer.out_channels for layer in layers)
        return model.eval(), Change(self.kind, changed, total, "channels", "per layer, L1")


@torch.no_grad()
def mask_filters(layer: nn.Conv2d, ratio: float) -> int:
    """Zero the ⌊ratio · n⌋ filters (weight [n, ...] and bias [n]) of least L1 norm, in place.

    Gives how many of them were not zero before.
    """
    norms = layer.weight.abs().flatten(1).sum(1)
    masked = norms.argsort(stable=True)[: int(ratio * len(norms) + 1e-9)]
    changed = int(norms[masked].count_nonzero())
    layer.weight[masked] = 0
    if layer.bias is not None:
        layer.bias[masked] = 0
    return changed
