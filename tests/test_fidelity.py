"""A twin that could compute otherwise than the file is none, and what runtimes round the twin rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from secure_export import twins
from secure_export.errors import CompressError
from tests.gating import FLOAT, array, small

Nodes = list[NodeProto]


def node(kind: str, reads: str, makes: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, reads.split(), [makes], **attributes)


def graph(*nodes: NodeProto, weights: Any = ()) -> ModelProto:
    return small(list(nodes), ["n", 4], weights)


def retyped(proto: ModelProto, opset: int = 0, beside: int = 0) -> ModelProto:
    """The graph in another opset, or in two, or with an input in double precision."""
    if beside:
        proto.opset_import.append(helper.make_opsetid("ai.onnx", beside))
    elif opset:
        proto.opset_import[0].version = opset
    else:
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return proto


GRID = [array("scale", 0.1, np.float32), array("zero", 0, np.uint8), array("whole", 3, np.uint8)]
OTHERWISE: dict[str, ModelProto] = {
    "a cast that overflows": graph(
        node("Cast", "input", "number", to=TensorProto.INT32), node("Cast", "number", "logits", to=FLOAT)
    ),
    "a cast of a constant that overflows": graph(
        node("Cast", "large", "number", to=TensorProto.INT32),
        node("Cast", "number", "one", to=FLOAT),
        node("Add", "input one", "logits"),
        weights=[array("large", 3e9, np.float32)],
    ),
    "codes that are divided": graph(
        node("QuantizeLinear", "input scale zero", "codes"),
        node("Div", "codes whole", "fewer"),
        node("DequantizeLinear", "fewer scale zero", "logits"),
        weights=GRID,
    ),
    "axes that mean none": graph(
        node("ReduceMean", "input", "logits", noop_with_empty_axes=1),
    ),
    "codes of another type": graph(
        node("QuantizeLinear", "input scale", "codes", output_dtype=TensorProto.INT8),
        node("Cast", "codes", "logits", to=FLOAT),
        weights=GRID,
    ),
    "an average over part of a window": graph(
        node("Reshape", "input image", "signal"),
        node("AveragePool", "signal", "means", kernel_shape=[2], pads=[1, 0]),
        node("Flatten", "means", "logits"),
        weights=[array("image", [-1, 1, 4])],
    ),
    "truths as integers": graph(
        node("Cast", "input", "truth", to=TensorProto.BOOL),
        node("Cast", "truth", "number", to=TensorProto.INT64),
        node("Cast", "number", "logits", to=FLOAT),
    ),
    "numbers beside which others are lost": graph(
        node("Add", "input far", "away"),
        node("Sub", "away far", "logits"),
        weights=[array("far", 2.0**27, np.float32)],
    ),
    "a rounding that is rounded again": graph(
        node("QuantizeLinear", "input scale zero", "codes"),
        node("DequantizeLinear", "codes scale zero", "coarse"),
        node("QuantizeLinear", "coarse finer zero", "again"),
        node("DequantizeLinear", "again finer zero", "logits"),
        weights=[*GRID, array("finer", 0.01, np.float32)],
    ),
    "a rounding that is rounded again further on": graph(
        node("QuantizeLinear", "input scale zero", "codes"),
        node("DequantizeLinear", "codes scale zero", "coarse"),
        node("Identity", "coarse", "same"),
        node("QuantizeLinear", "same finer zero", "again"),
        node("DequantizeLinear", "again finer zero", "logits"),
        weights=[*GRID, array("finer", 0.01, np.float32)],
    ),
    "a choice by the samples' values": graph(
        node("QuantizeLinear", "input scale zero", "codes"),
        node("Cast", "codes", "places", to=TensorProto.INT64),
        node("Gather", "table places", "logits"),
        weights=[*GRID, array("table", np.arange(256), np.float32)],
    ),
    "double precision": retyped(graph(node("Relu", "input", "logits"))),
    "a softmax over several axes": retyped(graph(node("Softmax", "input", "logits")), opset=12),
    "a softmax of two opsets": retyped(graph(node("Softmax", "input", "logits")), beside=12),
    "a scale of nothing": graph(
        node("QuantizeLinear", "input nothing zero", "codes"),
        node("DequantizeLinear", "codes scale zero", "logits"),
        weights=[*GRID, array("nothing", 0, np.float32)],
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_a_runtime_may_compute_otherwise_has_no_twin(name: str) -> None:
    with pytest.raises(CompressError, match="no differentiable twin of crafted"):
        twins.Twin(OTHERWISE[name], "crafted")(torch.rand(2, 4))


def test_half_precision_ends_where_the_file_s_does() -> None:
    """65504 is its largest number: what is above is infinite in the file, and has to be in the twin."""
    proto = graph(
        node("Mul", "input many", "large"),
        node("Cast", "large", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "single", to=FLOAT),
        node("Div", "many single", "logits"),
        weights=[array("many", 70000, np.float32)],
    )
    inputs = torch.tensor([[0.1, 0.5, 0.99, 1.0]])
    (expected,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"input": inputs.numpy()})
    probed = inputs.clone().requires_grad_(True)
    logits = twins.Twin(proto, "crafted")(probed)
    assert torch.equal(logits.detach(), torch.from_numpy(expected))
    assert logits[0, 3] == 0
    (slope,) = torch.autograd.grad(logits[0, 0], probed)
    assert slope[0, 0] != 0


def test_whole_numbers_are_divided_as_such() -> None:
    proto = graph(
        node("Shape", "input", "sizes"),
        node("Div", "sizes three", "thirds"),
        node("Cast", "thirds", "numbers", to=FLOAT),
        node("Gather", "numbers last", "third"),
        node("Mul", "input third", "logits"),
        weights=[array("three", [3]), array("last", 1)],
    )
    inputs = torch.rand(2, 4)
    assert torch.equal(twins.Twin(proto, "crafted")(inputs), inputs)


def test_a_rounding_on_the_same_grid_changes_nothing_and_has_a_twin() -> None:
    proto = graph(
        node("QuantizeLinear", "input scale zero", "codes"),
        node("DequantizeLinear", "codes scale zero", "coarse"),
        node("Flatten", "coarse", "flat"),
        node("QuantizeLinear", "flat scale zero", "again"),
        node("DequantizeLinear", "again scale zero", "logits"),
        weights=GRID,
    )
    inputs = torch.rand(2, 4)
    assert torch.allclose(twins.Twin(proto, "crafted")(inputs), (inputs / 0.1).round() * 0.1)
