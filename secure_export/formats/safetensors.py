"""The weights alone, with the channels that pruning kept: a checkpoint of the user's own architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from secure_export import channels
from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.loading import Normalized

if TYPE_CHECKING:
    from torch import Tensor


class Safetensors(Format):
    """One .safetensors file: float weights by their names in the architecture, and a plan of what was cut."""

    suffix: ClassVar[str] = ".safetensors"
    runtime: ClassVar[str] = "safetensors"

    def write(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write `model` (eval mode) to `path`; a normalization in front of it stays with the user's options.

        Raises:
            CompressError: it is no longer the architecture with plain weights, such as a quantized graph.
        """
        from safetensors.torch import save

        plan = channels.plan_of(model)
        if plan is None:
            raise CompressError("cannot export to .safetensors: no plan of kept channels gives this model")
        if isinstance(model, Normalized):
            model, plan = model.model, {key.removeprefix("model."): kept for key, kept in plan.items()}
        state = model.state_dict()
        for key, value in state.items():
            if type(value) not in (torch.Tensor, nn.Parameter):
                raise CompressError(
                    f"cannot export to .safetensors: {key} is a {type(value).__name__}",
                    hint="quantized weights ship as .pt2, .onnx or .pte",
                )
        # Tied weights are stored under each of their names; the architecture ties them again.
        plain = {key: value.detach().clone().contiguous() for key, value in state.items()}
        path.write_bytes(save(plain, {channels.KEY: channels.stored(plan)} if plan else None))
