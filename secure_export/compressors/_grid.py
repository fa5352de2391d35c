"""What steps share that choose the side of every rounding before ONNX Runtime's quantizer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper
from pydantic import Field

from secure_export.compressors import FileStep
from secure_export.compressors._ort import quantized
from secure_export.records.measured import Change

WEIGHTED = ("Conv", "Gemm", "MatMul")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weight:
    """One weight tensor of a Conv, Gemm or MatMul, on the grid that its quantizer will choose."""

    values: Array
    scaled: Array
    """In units of their step."""
    step: Array
    """Broadcastable to `values`."""
    over: tuple[int, ...] | None
    """Axes that share a step; None = all."""
    name: str
    node: NodeProto

    def placed(self, codes: Array) -> tuple[Array, int]:
        """The values at integer `codes`, and how many are not those of nearest rounding."""
        highest = self.scaled.max(axis=self.over, keepdims=True)
        lowest = self.scaled.min(axis=self.over, keepdims=True)
        codes = np.clip(codes, np.ceil(lowest - 1e-6), np.floor(highest + 1e-6))
        # The extremes define the step: they stay, or the quantizer would choose another grid.
        fixed = (self.scaled == highest) | (self.scaled == lowest)
        changed = ~fixed & (codes != np.round(self.scaled))
        return np.where(fixed, self.values, codes * self.step), int(changed.sum())


Choose = Callable[[Weight], Array]
"""The codes of a weight tensor: integers beside its scaled values."""


class GridStep(FileStep):
    """Base of steps that put weights on the grid of the `ort-static-int8` that follows with equal fields."""

    per_channel: bool = Field(True, description="as in the ort-static-int8 that follows")
    weight_type: str = Field("int8", pattern="^u?int8$", description="as in the ort-static-int8 that follows")
    reduce_range: bool = Field(False, description="as in the ort-static-int8 that follows")

    def on_grid(
        self, source: Path, target: Path, begin: Callable[[onnx.ModelProto], Choose], detail: str
    ) -> Change:
        """Write `source` with its weights on the grid into `target`; counts those not rounded to nearest.

        `begin` sees the prepared graph and gives what chooses the codes, weight after weight in its order.

        Raises:
            CompressError: no valid ONNX file.
        """
        counts = [0, 0]

        def rewrite(prepared: Path, written: Path) -> None:
            proto = onnx.load(prepared)
            choose = begin(proto)
            tensors = {t.name: t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}
            for node in proto.graph.node:
                if node.op_type in WEIGHTED and node.input[1] in tensors:
                    tensor = tensors.pop(node.input[1])
                    weight = self._weight(numpy_helper.to_array(tensor).astype(np.float64), node)
                    moved, changed = weight.placed(choose(weight))
                    counts[0] += changed
                    counts[1] += weight.values.size
                    tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), tensor.name))
            onnx.save(proto, written)

        change = quantized(self.kind, source, target, rewrite)
        return replace(change, changed=counts[0], total=counts[1], unit="weights", detail=detail)

    def _weight(self, values: Array, node: NodeProto) -> Weight:
        axis = _axis(node)
        step = self._step(values, axis)
        scaled = np.divide(values, step, out=np.zeros_like(values), where=step > 0)
        over = tuple(i for i in range(values.ndim) if i != axis) if self.per_channel else None
        return Weight(values, scaled, step, over, node.input[1], node)

    def _step(self, weight: Array, axis: int) -> Array:
        """As OrtStaticInt8 will choose it (its docstring has the formulas), broadcastable to `weight`."""
        if not self.per_channel and self.weight_type == "uint8":
            span = max(weight.max(), 0.0) - min(weight.min(), 0.0)
            return np.full((1,) * weight.ndim, span / (127 if self.reduce_range else 255))
        levels = 64.0 if self.reduce_range else 127.0 if self.weight_type == "int8" else 127.5
        over = tuple(i for i in range(weight.ndim) if i != axis) if self.per_channel else None
        return np.asarray(np.abs(weight).max(axis=over, keepdims=True) / levels)


def _axis(node: NodeProto) -> int:
    """The axis of output channels of the node's weight."""
    flags = {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}
    return 0 if node.op_type == "Conv" or flags.get("transB") else 1
