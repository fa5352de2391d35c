"""Int4 weights by ONNX Runtime (MatMulNBits), activations in float: for networks of matrix products.

Convolutions stay as they are, so on a ResNet only the head changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.compressors._ort import quantized
from secure_export.errors import CompressError
from secure_export.records.measured import Change


class OrtInt4WeightOnly(FileStep):
    """One scale for every `block_size` weights of an output; linear layers become MatMul and Add before."""

    block_size: Literal[16, 32, 64, 128] = Field(32, description="weights that share a scale")
    symmetric: bool = Field(True, description="codes -8..7 around zero, instead of a zero point per block")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the ONNX file `source` into `target`; counts the weight tensors that became integers.

        Raises:
            CompressError: no valid ONNX file, no matrix product in it, or ONNX Runtime cannot quantize it.
        """

        def quantize(prepared: Path, written: Path) -> None:
            proto = onnx.load(prepared)
            as_products(proto.graph)
            step = MatMulNBitsQuantizer(
                proto, bits=4, block_size=self.block_size, is_symmetric=self.symmetric, accuracy_level=1
            )
            step.process()
            onnx.save(step.model.model, written)

        change = quantized(self.kind, source, target, quantize, f"4 bits, blocks of {self.block_size}")
        if not change.changed:
            target.unlink()
            raise CompressError(
                f"{self.kind}: {source.name} holds no matrix product of weights",
                hint="convolutions are left as they are: use ort-static-int8",
            )
        return change


def as_products(graph: onnx.GraphProto) -> None:
    """Write every Gemm that is a linear layer as MatMul and Add, in place: the quantizer knows only those."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1 and not attributes.get(
            "transA"
        )
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        name = f"{node.output[0]}_weight"
        graph.initializer.append(
            numpy_helper.from_array((weight.T if attributes.get("transB") else weight).copy(), name)
        )
        product = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        nodes.append(
            helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.name}_product")
        )
        if len(node.input) > 2:
            nodes.append(
                helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias")
            )
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
