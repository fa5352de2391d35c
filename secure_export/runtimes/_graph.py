"""Find the head in an exported program's graph; the torch.fx counterpart of reading it from ONNX."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from secure_export.errors import CompressError

INTEGER = "aten::_int_mm"
LINEAR = ("aten::linear", "aten::addmm", "aten::mm", "aten::conv2d", INTEGER)
PASSED = ("aten::view", "aten::reshape", "aten::flatten", "aten::squeeze", "aten::to", "aten::mean")
"""What may stand between the head and the logits: it moves, converts or averages them, no more."""

ROUNDED = ("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor")
"""What may round the logits; locators read them unrounded."""


def split_at_head(program: GraphModule, file: str) -> tuple[GraphModule, Tensor, Tensor]:
    """(program that ends before the head, weight [K, D], bias [K]).

    Raises:
        CompressError: no Linear or 1x1 Conv makes the logits, or its weight depends on the input.
    """
    head, after = _head(program, file)
    name = _name(head)
    data: object
    weight: object
    bias: object
    if name == INTEGER:
        data, weight, bias = _rounded(head, file), head.args[1], None
    elif name == "aten::addmm":
        bias, data, weight = head.args[:3]
    else:
        data, weight, bias = (*head.args, None)[:3]
    matrix = _constant(program, weight, file)
    if matrix.ndim == 4 and matrix.shape[2:] != (1, 1):
        raise CompressError(f"cannot read the head of {file}: a convolution wider than 1x1")
    matrix = matrix.T if name in ("aten::addmm", "aten::mm", INTEGER) else matrix.flatten(1)
    vector = torch.zeros(len(matrix)) if bias is None else _constant(program, bias, file)
    for operator, node in reversed(after):
        value = _constant(program, node, file).flatten()
        if operator == "aten::add":
            vector = vector + value
        else:
            matrix, vector = matrix * value[:, None], vector * value
    return _ending_at(program, data), matrix.contiguous(), vector


def unrounded(program: GraphModule) -> GraphModule:
    """The program up to where its logits are rounded."""
    (node,) = program.graph.output_node().all_input_nodes
    while _name(node) in ROUNDED:
        node = node.all_input_nodes[0]
    return _ending_at(program, node)


def input_shape(program: GraphModule) -> tuple[int, ...]:
    """The shape of one input, without the batch axis."""
    (placeholder,) = (node for node in program.graph.nodes if node.op == "placeholder")
    return tuple(int(size) for size in placeholder.meta["val"].shape[1:])


def _head(program: GraphModule, file: str) -> tuple[Node, list[tuple[str, object]]]:
    """The node of the head, and ("aten::add"|"aten::mul", constant) from the logits back to it.

    torchao writes a Linear as x @ integers * scale + bias; with dynamic activations the integers of x are
    shifted before and the shift subtracted after, and x's own scale is a factor: together they are x.
    """
    (node,) = program.graph.output_node().all_input_nodes
    after: list[tuple[str, object]] = []
    dynamic = is_dynamic(program)
    while (name := _name(node).removesuffix("_")) not in LINEAR:
        if name == "aten::mul" and dynamic and depends(node.args[1]):
            pass
        elif name in ("aten::add", "aten::mul"):
            after.append((name, node.args[1]))
        elif name == "aten::sub" and dynamic and not depends(node.args[1]):
            pass
        elif name not in (*PASSED, *ROUNDED):
            raise CompressError(
                f"cannot find the head of {file}: {name} stands between it and the logits",
                hint="locators that read a file need a Linear or 1x1 Conv as its last layer",
            )
        node = node.all_input_nodes[0]
    return node, after


def is_dynamic(program: GraphModule) -> bool:
    """Whether the program rounds what it computes on the fly, so that a head is read up to that rounding."""
    return any(_name(node) == INTEGER for node in program.graph.nodes)


def _rounded(head: Node, file: str) -> Node:
    """What is rounded to the integers that the head multiplies."""
    node = head.args[0]
    while isinstance(node, Node):
        if _name(node) == "torchao::quantize_affine":
            return node.all_input_nodes[0]
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    raise CompressError(f"cannot read the head of {file}: its integers come from elsewhere")


def depends(node: object) -> bool:
    """Whether a node is computed from the input."""
    return any(used.op == "placeholder" for used in _ancestors(node))


def _name(node: Node) -> str:
    """The operator without its overload, such as "aten::linear"."""
    return node.target._schema.name if isinstance(node.target, OpOverload) else str(node.target)


def _constant(program: GraphModule, node: object, file: str) -> Tensor:
    """The value, dequantized, of a node that does not depend on the input; the program itself computes it."""
    if depends(node):
        raise CompressError(f"cannot read the head of {file}: its weight depends on the input")
    with torch.no_grad():
        value: Tensor = _ending_at(program, node)(torch.zeros(2, *input_shape(program)))
    return value.detach().float().clone()


def _ancestors(node: object) -> set[Node]:
    """Every node that `node` is computed from, itself included."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if isinstance(current, Node) and current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _ending_at(program: GraphModule, node: object) -> GraphModule:
    """A copy of `program` whose output is `node`."""
    part = copy.deepcopy(program)
    (same,) = (twin for twin in part.graph.nodes if twin.name == getattr(node, "name", None))
    part.graph.output_node().args = ((same,),)
    part.graph.eliminate_dead_code()
    part.recompile()
    return part
