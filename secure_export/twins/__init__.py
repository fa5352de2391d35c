"""Differentiable twins: the graph of a written file in torch, with the file's own weights and rounding.

A probe needs gradients and a deployed file gives none. The twin is read from the file's bytes, node by node,
so it wakes where the file wakes; how far it agrees with the file is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from torch import Tensor, nn

from secure_export.errors import CompressError
from secure_export.twins._fidelity import (
    SOFTMAX_OF_ONE_AXIS,
    check_choice,
    check_order,
    in_halves,
    types_made,
    unheeded,
)
from secure_export.twins._operators import OPERATORS, one_grid, rounded
from secure_export.words import described, first_line, printable

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from secure_export.twins._operators import Attributes, Operator, Values

RUN_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What torch and numpy raise on parts that an ONNX file may have and a twin has not."""


LINEAR = ("Conv", "Gemm", "MatMul")
NORMALIZING = ("BatchNormalization", "LayerNormalization")
FEWEST = 4
"""Values that hold no pattern yet: the smallest patch that is searched has as many positions."""
UNLEARNED = ("Clip", "DequantizeLinear", "DynamicQuantizeLinear", "Pow", "QuantizeLinear")
"""Operators whose constants are grids and bounds."""


@dataclass(frozen=True)
class Step:
    """One node: the operator, and the names of what it reads and makes; "" for what is left out."""

    kind: str
    operator: Operator
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    attributes: Attributes


class Twin(nn.Module):
    """An ONNX graph as a module: raw inputs [N, ...] to logits [N, classes], with gradients to the inputs.

    Rounding passes gradients straight through inside its range (Bengio et al. 2013) and stops them outside.

    Raises:
        CompressError: an operator that has no twin, or several inputs.
    """

    def __init__(self, proto: ModelProto, file: str) -> None:
        super().__init__()
        graph = proto.graph
        unknown = sorted({node.op_type for node in graph.node} - OPERATORS.keys())
        if unknown:
            raise CompressError(f"no differentiable twin of {file}: operator {', '.join(unknown)}")
        # Of two imports of the same operators, nobody says which a runtime takes.
        opset = min((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), default=0)
        if opset < SOFTMAX_OF_ONE_AXIS and any(node.op_type == "Softmax" for node in graph.node):
            raise CompressError(
                f"no differentiable twin of {file}: Softmax of opset {opset}, over several axes"
            )
        self.constants: dict[str, Tensor] = {
            tensor.name: _constant(tensor, file) for tensor in graph.initializer
        }
        given = [value.name for value in graph.input if value.name not in self.constants]
        if len(given) != 1:
            raise CompressError(f"no differentiable twin of {file}: {len(given)} inputs, expected one")
        self.input, self.output, self.file = given[0], graph.output[0].name, file
        self.batch = batch_of(proto)
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
        steps = []
        for node in graph.node:
            step = _step(node, types, file)
            if all(name in self.constants for name in step.reads if name):
                self._run(step, self.constants)
            else:
                steps.append(step)
        self.steps = _fused(steps, self.constants, self.output)
        try:
            check_order(steps, self.constants)
        except ValueError as error:
            raise CompressError(f"no differentiable twin of {file}: {error}") from error

    def forward(self, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits [N, classes]; `weights` stand in for constants of the same name.

        A graph of a fixed batch is run in batches of that many, as runtimes do: it can compute with the size.
        """
        if self.batch in (0, len(inputs)):
            return self._logits(inputs, weights)
        short = -len(inputs) % self.batch
        filled = torch.cat([inputs, inputs.new_zeros(short, *inputs.shape[1:])])
        parts = [self._logits(part, weights) for part in torch.split(filled, self.batch)]
        return torch.cat(parts)[: len(inputs)]

    def _logits(self, inputs: Tensor, weights: Mapping[str, Tensor] | None) -> Tensor:
        return self.tensor(self.output, {self.input: inputs, **(weights or {})})

    def values(self, inputs: Tensor) -> dict[str, Tensor]:
        """Every tensor of the graph, by name, for as many samples as it takes."""
        values = {**self.constants, self.input: inputs}
        for step in self.steps:
            self._run(step, values)
        return values

    def weights(self) -> dict[str, Tensor]:
        """Float constants that are learned, by the names that `forward` takes: wherever a pattern can lie.

        Those of convolutions, linear layers and normalizations, and all of more than FEWEST values that meet
        the data; what normalizes three channels stays.
        """
        found = {}
        for step in self.steps:
            # A variance has to stay positive.
            names = step.reads[:4] if step.kind == "BatchNormalization" else step.reads
            for name in () if step.kind in UNLEARNED else names:
                value = self.constants.get(name)
                if value is None or not value.is_floating_point():
                    continue
                if value.numel() > FEWEST or step.kind in (*LINEAR, *NORMALIZING):
                    found[name] = value
        return found

    def biases(self) -> set[str]:
        """Those of weights() that are added, one a channel, to what another weight makes."""
        made = [step.reads[2:3] for step in self.steps if step.kind in (*LINEAR, *NORMALIZING)]
        return {name for names in made for name in names}

    def tensor(self, name: str, known: Mapping[str, Tensor]) -> Tensor:
        """The tensor `name` of the graph; `known` ones stand in for what the graph would compute."""
        values = {**self.constants, **known}
        needed, plan = {name} - values.keys(), []
        for step in reversed(self.steps):
            if needed.intersection(step.makes):
                plan.append(step)
                needed.update(set(step.reads) - values.keys())
        for step in reversed(plan):
            self._run(step, values)
        return values[name]

    def _run(self, step: Step, values: dict[str, Tensor]) -> None:
        try:
            operands: Values = [values[name] if name else None for name in step.reads]
            check_choice(step.kind, operands[1:])
            made = step.operator(operands, step.attributes)
        except RUN_ERRORS as error:
            reason = first_line(error)
            raise CompressError(f"no differentiable twin of {self.file}: {step.kind}: {reason}") from error
        outputs = made if isinstance(made, tuple) else (made,)
        values.update(zip(step.makes, outputs, strict=False))


def _step(node: NodeProto, types: dict[str, int], file: str) -> Step:
    """A node as torch computes it; the types of what it makes join `types`.

    Raises:
        CompressError: runtimes would compute something else.
    """
    kind, operator = node.op_type, OPERATORS[node.op_type]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if name := unheeded(kind, attributes):
        raise CompressError(f"no differentiable twin of {file}: {kind} with {printable(name)}")
    try:
        made = types_made(kind, attributes, [types[name] for name in node.input if name])
    except (LookupError, ValueError) as error:
        raise CompressError(f"no differentiable twin of {file}: {kind} {first_line(error)}") from error
    types.update(zip(node.output, made, strict=False))
    if made[0] == TensorProto.FLOAT16:
        operator = in_halves(operator)
    return Step(kind, operator, tuple(node.input), tuple(node.output), attributes)


def _fused(steps: Sequence[Step], constants: Mapping[str, Tensor], output: str) -> list[Step]:
    """The steps with every activation that is quantized and dequantized on one grid rounded in one step."""
    makers = {name: step for step in steps for name in step.makes}
    made = []
    for step in steps:
        quantizer = makers.get(step.reads[0])
        if step.kind == "DequantizeLinear" and quantizer and quantizer.kind == "QuantizeLinear":
            grid = [constants.get(name) for name in step.reads[1:]]
            if quantizer.reads[1:] == step.reads[1:] and one_grid(grid):
                step = replace(step, operator=rounded, reads=(quantizer.reads[0], *step.reads[1:]))
        made.append(step)
    read = {name for step in made for name in step.reads} | {output}
    return [step for step in made if read & set(step.makes)]


def batch_of(proto: ModelProto) -> int:
    """The number of samples that a graph takes at a time; 0 = any."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    shape = next(v for v in proto.graph.input if v.name not in weights).type.tensor_type.shape
    return shape.dim[0].dim_value if shape.dim else 0


def _constant(tensor: TensorProto, file: str) -> Tensor:
    """Half precision as float32 and four bits as eight, for the twin computes in float32."""
    try:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            array = array.astype(np.float32)
        elif tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            array = array.astype(np.int8)
        return torch.from_numpy(array.copy())
    except RUN_ERRORS as error:
        reason = f"tensor {printable(tensor.name)!r} cannot be read: {described(error)}"
        raise CompressError(f"no differentiable twin of {file}: {reason}") from error


def read(path: Path) -> ModelProto:
    """The graph of an ONNX file.

    Raises:
        CompressError: no readable ONNX.
    """
    try:
        return onnx.load_from_string(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise CompressError(f"{path.name} is no valid ONNX file: {error}") from error


def of_onnx(path: Path) -> Twin:
    """The twin of an ONNX file.

    Raises:
        CompressError: no readable ONNX, or a graph that has no twin.
    """
    return Twin(read(path), path.name).eval()
