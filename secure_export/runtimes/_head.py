"""Find the head in an ONNX graph: the last linear layer before the logits, and the tensor that feeds it.

What locators see is read from the file that ships, so int8 and pruned weights are seen as they are. Nothing
is dequantized by hand: the parts (data, weight, bias, scales) become outputs of a copy of the graph, and the
runtime computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from secure_export.errors import CompressError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import ModelProto, NodeProto
    from torch import Tensor

LINEAR = ("Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "Conv", "ConvInteger")
PASSED = ("Identity", "Cast", "Dropout", "Flatten", "Reshape", "Squeeze", "GlobalAveragePool", "ReduceMean")
"""What may stand between the head and the logits without changing which class wins by what."""
ROUNDED = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class Head:
    """Names of the tensors that make logits = data @ weight.T + bias, and the nodes that they pass."""

    node: NodeProto
    data: str = ""
    weight: str = ""
    zero_point: str = ""
    """Of an integer weight; empty for a float one."""
    bias: str = ""
    """Of the node itself; others stand in `after`."""
    after: list[tuple[str, str]] = field(default_factory=list)
    """("Add"|"Sub"|"Mul"|"Div", constant) in the order in which the data passes them."""
    rounded: list[NodeProto] = field(default_factory=list)
    """Quantize and dequantize nodes behind the head, from the logits backwards."""

    @property
    def integer(self) -> bool:
        """The data is rounded on the fly, so the parts reproduce the logits only up to that rounding."""
        return self.node.op_type.endswith("Integer")

    @property
    def constants(self) -> list[str]:
        """Every constant that `affine` needs."""
        names = (self.weight, self.zero_point, self.bias, *(name for _, name in self.after))
        return [name for name in names if name]


def find_head(proto: ModelProto, file: str) -> Head:
    """Walk back from the logits to the linear layer that makes them.

    Raises:
        CompressError: something that is not linear, or that mixes two paths, stands in between.
    """
    graph = proto.graph
    made_by = {output: node for node in graph.node for output in node.output}
    varying = _varying(proto)
    name = graph.output[0].name
    after: list[tuple[str, str]] = []
    rounded: list[NodeProto] = []
    while (node := made_by.get(name)) is not None:
        if node.op_type in LINEAR:
            return _finish(Head(node, after=after[::-1], rounded=rounded), made_by, varying, file)
        moving = [operand for operand in node.input if operand in varying]
        if node.op_type in ROUNDED:
            rounded.append(node)
            name = node.input[0]
        elif node.op_type in PASSED:
            name = node.input[0]
        elif node.op_type in ("Add", "Sub", "Mul", "Div") and len(node.input) == 2:
            name, constant = _operands(node, moving, made_by, varying)
            if not constant:
                break
            after.append((node.op_type, constant))
        else:
            break
    found = f"{node.op_type} {node.name!r}" if node is not None else "the input"
    raise CompressError(
        f"cannot find the head of {file}: {found} stands between it and the logits",
        hint="locators that read a file need a Linear or 1x1 Conv as its last layer",
    )


def _varying(proto: ModelProto) -> set[str]:
    """Names of the tensors that depend on the input; ONNX keeps nodes in topological order."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    varying = {value.name for value in proto.graph.input} - constants
    for node in proto.graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
    return varying


def _operands(
    node: NodeProto, moving: list[str], made_by: Mapping[str, NodeProto], varying: set[str]
) -> tuple[str, str]:
    """(data, constant) of an elementwise node; the constant is "" where there is none."""
    first, second = node.input
    if len(moving) == 1 and (second not in varying or node.op_type in ("Add", "Mul")):
        return moving[0], second if moving[0] == first else first
    if node.op_type != "Mul":
        return first, ""
    # Dynamic int8: integers * (input scale * weight scale). Only the weight's scale is a constant.
    for data, scale in ((first, second), (second, first)):
        maker = made_by.get(scale)
        if maker is not None and maker.op_type == "Mul":
            factors = [name for name in maker.input if name not in varying]
            if len(factors) == 1:
                return data, factors[0]
    return first, ""


def _finish(head: Head, made_by: Mapping[str, NodeProto], varying: set[str], file: str) -> Head:
    head.data, head.weight = head.node.input[0], head.node.input[1]
    if head.integer:
        quantizer = made_by.get(head.data)
        if quantizer is None or quantizer.op_type != "DynamicQuantizeLinear":
            raise CompressError(f"cannot read the head of {file}: its integers come from elsewhere")
        head.data = quantizer.input[0]
        head.zero_point = head.node.input[3] if len(head.node.input) > 3 else ""
    else:
        place = 5 if head.node.op_type == "MatMulNBits" else 2
        head.bias = head.node.input[place] if len(head.node.input) > place else ""
    attributes = _attributes(head.node)
    if (
        head.data not in varying
        or head.weight in varying
        or attributes.get("transA", 0)
        or attributes.get("group", 1) != 1
        or set(attributes.get("kernel_shape", [1])) != {1}
    ):
        raise CompressError(f"cannot read the head of {file}: {head.node.op_type} is no plain linear layer")
    return head


def with_parts(proto: ModelProto, head: Head) -> tuple[bytes, str]:
    """A copy of the graph that also gives the head's parts, and the name of its unrounded logits."""
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    if head.node.op_type == "MatMulNBits":
        _unpacked(graph.graph, head)
    logits = proto.graph.output[0].name
    bypass = {node.output[0]: node.input[0] for node in head.rounded}

    def source(name: str) -> str:
        while name in bypass:
            name = bypass[name]
        return name

    for node in graph.graph.node:
        if not set(node.output) & set(bypass):
            node.input[:] = [source(name) for name in node.input]
    for name in dict.fromkeys([source(logits), head.data, *head.constants]):
        if name != logits:
            graph.graph.output.append(onnx.ValueInfoProto(name=name))
    return graph.SerializeToString(), source(logits)


def _unpacked(graph: onnx.GraphProto, head: Head) -> None:
    """The same node on the identity gives its packed weight [D, K] as floats."""
    size = int(_attributes(head.node)["K"])
    identity = onnx.numpy_helper.from_array(np.eye(size, dtype=np.float32), f"{head.weight}_identity")
    graph.initializer.append(identity)
    node = onnx.NodeProto()
    node.CopyFrom(head.node)
    node.input[0], node.output[0], node.name = identity.name, f"{head.weight}_unpacked", "unpacked head"
    graph.node.append(node)
    head.weight = node.output[0]


def affine(head: Head, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] as float32 from the constants' values."""
    attributes = _attributes(head.node)
    weight = constants[head.weight].float()
    if head.zero_point:
        weight = weight - constants[head.zero_point].float()
    if head.node.op_type in ("Conv", "ConvInteger"):
        weight = weight.flatten(1)
    elif not attributes.get("transB", 0):
        weight = weight.T
    weight = weight * attributes.get("alpha", 1.0)
    bias = torch.zeros(weight.shape[0])
    if head.bias:
        bias = bias + attributes.get("beta", 1.0) * constants[head.bias].float().flatten()
    for operator, name in head.after:
        value = constants[name].float().flatten()
        match operator:
            case "Add":
                bias = bias + value
            case "Sub":
                bias = bias - value
            case "Mul":
                weight, bias = weight * value[:, None], bias * value
            case "Div":
                weight, bias = weight / value[:, None], bias / value
    return weight.contiguous(), bias


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
