"""Weights rounded onto the grid of a toolchain that is not installed, as floats in the same module.

What wakes a quantization-conditioned backdoor is the weight grid, not the runtime: a sweep over
`per_channel`, `grid` and `fold` stands in for the next person's toolchain. Activations stay in float.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secure_export.batchnorms import readers, scale_of
from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import weighted_layers
from secure_export.records.measured import Change

Grid = Literal["127", "127.5", "asymmetric", "7-bit"]
SYMMETRIC: dict[str, tuple[float, int, int]] = {
    "127": (127, -127, 127),
    "127.5": (127.5, -128, 127),
    "7-bit": (64, -64, 64),
}
"""absmax / step, and the lowest and highest code."""


class FakeQuant(ModuleStep):
    """127 is ONNX Runtime's int8 and XNNPACK, 127.5 X86Inductor and ONNX Runtime's uint8, 7-bit reduce_range.

    Deployed toolchains fold BatchNorm into the convolution first, so unfolded grids are for the sweep alone.
    """

    per_channel: bool = Field(True, description="one step per output channel instead of per tensor")
    grid: Grid = Field("127", description="absmax/127, absmax/127.5, (max - min)/255, or absmax/64")
    fold: bool = Field(True, description="round the weights as they are with BatchNorm folded into them")

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Round every Conv2d and Linear of `model` in place, the head too; counts tensors that changed.

        Raises:
            CompressError: a weight is quantized already.
        """
        layers = weighted_layers(model, head="")
        folded = followers(model, context.calibration.floats(slice(0, 2))) if self.fold else {}
        changed = 0
        with torch.no_grad():
            for name, layer in layers:
                factor = scale_of(folded[name]) if name in folded else torch.ones(len(layer.weight))
                factor = factor.view(-1, *(1 for _ in layer.weight.shape[1:]))
                rounded = on_grid(layer.weight * factor, self.grid, self.per_channel) / factor
                # A BatchNorm that gives a channel no weight leaves nothing to round.
                rounded = torch.where(factor == 0, layer.weight, rounded)
                changed += not torch.equal(rounded, layer.weight)
                layer.weight.copy_(rounded)
        grid = "per channel" if self.per_channel else "per tensor"
        detail = f"{self.grid} {grid}, BatchNorm {'folded' if self.fold else 'unfolded'} ({len(folded)})"
        return model.eval(), Change(self.kind, changed, len(layers), "tensors", detail)


def on_grid(weight: Tensor, grid: Grid, per_channel: bool) -> Tensor:
    """`weight` [out, ...] rounded to the codes of `grid`, as floats; a zero channel stays zero."""
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    if grid == "asymmetric":
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        step = positive((high - low) / 255)
        zero = (-low / step).round()
        codes = ((rows / step).round() + zero).clamp(0, 255) - zero
    else:
        divisor, lowest, highest = SYMMETRIC[grid]
        step = positive(rows.abs().amax(1, keepdim=True) / divisor)
        codes = (rows / step).round().clamp(lowest, highest)
    return (codes * step).view_as(weight)


def positive(step: Tensor) -> Tensor:
    """Steps, 1 where all weights are zero."""
    return torch.where(step > 0, step, torch.ones_like(step))


def followers(model: nn.Module, example: Tensor) -> dict[str, _BatchNorm]:
    """The one BatchNorm that reads each layer's output, by the layer's name; found by running the model."""
    found = {}
    for name, read_by in readers(model, example, (nn.Conv2d, nn.Linear)).items():
        norms = [norm for norm in map(model.get_submodule, read_by) if isinstance(norm, _BatchNorm)]
        norms = [norm for norm in norms if norm.running_var is not None]
        if len(norms) == 1:
            found[name] = norms[0]
    return found
