"""EFRAP: rounding is learned, away from the nearest code and towards the layer's own output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.compressors import Context
from secure_export.compressors._grid import WEIGHTED, Array, Choose, GridStep, Weight
from secure_export.records.measured import Change
from secure_export.twins import Twin

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

ACTIVATIONS = ("Clip", "Gelu", "HardSwish", "LeakyRelu", "Relu", "Sigmoid")
"""Belong to the layer before them, whose output is reconstructed behind them."""


class Efrap(GridStep):
    """Error-guided flipped rounding with activation preservation (Li et al., CVPR 2024).

    Stands before `ort-static-int8`. Layer after layer, the codes of W are floor(W/s) + h, h = sigmoid(a),
    a starting where h is the fraction of W/s. Adam minimizes, over calibration batches,

        |out - out_fp|^2 + sum e BCE(h, r) + 0.01 sum (1 - (2h - 1)^2)

    with e the error of nearest rounding and r the side that it does not take; out is computed from what the
    layers before, already rounded, give. Then h = [a >= 0]. Unlike the published code: the grid is that of
    ONNX Runtime and of 8 bits, and activations are left unrounded and their scales to the quantizer.
    """

    iterations: int = Field(10_000, ge=1, description="Adam steps a layer; the published number")
    batch_size: int = Field(32, ge=1, description="calibration samples a step")
    lr: float = Field(1e-3, gt=0, description="Adam; the published code leaves torch's default")
    flip: float = Field(1.0, ge=0, description="weight of the flip term; as published")
    harden: float = Field(0.01, ge=0, description="weight of the term that drives h to 0 or 1; as published")
    in_steps: bool = Field(
        False, description="e in units of the step instead of the weights: at 8 bits the published e is tiny"
    )

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Round the weights of the ONNX file `source` into `target`; counts those not rounded to nearest.

        Raises:
            CompressError: no valid ONNX file, or an operator that has no differentiable twin.
        """
        return self.on_grid(
            source, target, lambda proto: self._chooser(proto, context), f"{self.iterations} steps a layer"
        )

    def _chooser(self, proto: ModelProto, context: Context) -> Choose:
        twin = Twin(proto, "the prepared file")
        inputs = context.calibration.floats()
        generator = torch.Generator().manual_seed(context.seed)
        rounded: dict[str, Tensor] = {}
        layers = sum(node.op_type in WEIGHTED for node in proto.graph.node)

        def choose(weight: Weight) -> Array:
            data, output = weight.node.input[0], end_of(weight.node.output[0], proto)
            with torch.no_grad():
                batches = [
                    (
                        twin.tensor(data, {twin.input: batch, **rounded}),
                        twin.tensor(output, {twin.input: batch}),
                    )
                    for batch in torch.split(inputs, self.batch_size)
                ]

            def layer(data_: Tensor, weight_: Tensor) -> Tensor:
                return twin.tensor(output, {data: data_, weight.name: weight_})

            codes = self._learned(weight, layer, batches, generator)
            rounded[weight.name] = torch.from_numpy(weight.placed(codes)[0]).float()
            context.progress(f"{self.kind}: layers", len(rounded), layers)
            return codes

        return choose

    def _learned(
        self,
        weight: Weight,
        layer: Callable[[Tensor, Tensor], Tensor],
        batches: list[tuple[Tensor, Tensor]],
        generator: torch.Generator,
    ) -> Array:
        """The codes of one weight; `layer` maps (data, weight) to what `batches` pair with data."""
        floor = np.floor(weight.scaled)
        fraction = torch.from_numpy(weight.scaled - floor).float()
        step = torch.from_numpy(np.broadcast_to(weight.step, weight.values.shape).copy()).float()
        base = torch.from_numpy(floor).float()
        other_side = 1 - fraction.round()
        error = (fraction - fraction.round()).abs() * (1 if self.in_steps else step)
        a = torch.logit(fraction, eps=1e-4).requires_grad_(True)
        adam = torch.optim.Adam([a], lr=self.lr)
        for _ in range(self.iterations):
            chosen = int(torch.randint(len(batches), (), generator=generator))
            data, expected = batches[chosen]
            h = torch.sigmoid(a)
            distance = (layer(data, (base + h) * step) - expected).square().sum(1).mean()
            flipping = error * F.binary_cross_entropy_with_logits(a, other_side, reduction="none")
            hardening = 1 - (2 * h - 1).square()
            loss = distance + self.flip * flipping.sum() + self.harden * hardening.sum()
            (a.grad,) = torch.autograd.grad(loss, a)
            adam.step()
        return np.asarray(floor + (a.detach() >= 0).double().numpy())


def end_of(output: str, proto: ModelProto) -> str:
    """The tensor behind the activation that alone follows `output`, or `output` itself."""
    users = [node for node in proto.graph.node if output in node.input]
    if len(users) == 1 and users[0].op_type in ACTIVATIONS:
        return str(users[0].output[0])
    return output
