"""The policy's purifier once more, on what the steps before it made of the purified model.

A pruning-conditioned backdoor sleeps in the whole model, where a purifier hardly reaches it; in the pruned
network it is awake like any other. The original model goes without this step: it shows what would ship.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import keep_zeros, pruned_masks, weighted_layers
from secure_export.errors import CompressError
from secure_export.records.measured import Change

if TYPE_CHECKING:
    from torch import nn


class Purify(ModuleStep):
    """Purifies the classes again that were purified in the whole model; fit split only, as there.

    Weights that are exactly zero are zero again afterwards. A purifier does not know of them while it trains,
    so this works better where `prune-structured` has removed channels than behind a mask.
    """

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Counts parameter tensors that moved.

        Raises:
            CompressError: nothing was purified, or the weights are quantized.
        """
        if context.purify is None:
            raise CompressError("purify: no model was purified before, so there is nothing to do again")
        weighted_layers(model, context.head)  # refuses quantized weights
        before, masks = copy.deepcopy(model.state_dict()), pruned_masks(model)
        purified = context.purify(model).eval()
        keep_zeros(purified, masks)
        after = dict(purified.named_parameters())
        changed = sum(not torch.equal(before[name], value) for name, value in after.items())
        return purified, Change(self.kind, changed, len(after), "tensors", "purified again")
