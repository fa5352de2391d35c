"""Where a graph can compute in a runtime what torch would not: such a graph has no twin.

Searches never see what the twin does not do: a backdoor behind an overflow that ends otherwise here and
there stays asleep in every one of them, and agreement on clean samples tells nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from onnx import TensorProto
from torch import Tensor

from secure_export.twins._operators import Attributes, Operator, Values

if TYPE_CHECKING:
    from secure_export.twins import Step

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
COUNTED = (*FLOATS, TensorProto.INT64, TensorProto.BOOL)
"""Types that torch computes with as runtimes do; codes of narrower integers are floats, and never wrap. Where
a file computes in double precision the twin does not, and what is tiny would be lost in it."""
MOVED = (
    "Cast Concat ConvInteger DequantizeLinear DynamicQuantizeLinear Expand Flatten Gather Identity "
    "MatMulInteger MaxPool QuantizeLinear Reshape Shape Slice Squeeze Transpose Unsqueeze"
)
"""Operators that may read narrow integers: they carry them on, or take them as what they stand for."""
LARGEST = 1e6
"""Of a constant that is computed with: beside larger numbers small ones are lost, or not, as a runtime orders
and fuses its sums."""
CARRYING = "Cast Dropout Flatten Identity Reshape Squeeze Transpose Unsqueeze"
"""Operators behind which a value is still what it was."""
CHOOSING = "Expand Gather Reshape Slice Squeeze Unsqueeze"
"""Operators that are told by integers what to take."""
BOUNDS = ("Clip", "Pow")
"""Operators whose constants are no terms or factors."""
SOFTMAX_OF_ONE_AXIS = 13
"""The first opset in which Softmax is taken along one axis, the last one unless it is named."""
ANY = object()
POOLED = "kernel_shape pads auto_pad strides ceil_mode"
READ: Mapping[str, str] = {
    "AveragePool": f"{POOLED} count_include_pad",
    "BatchNormalization": "epsilon",
    "Cast": "to",
    "Clip": "min max",
    "Concat": "axis",
    "Conv": "pads auto_pad strides dilations group",
    "ConvInteger": "pads auto_pad strides dilations group",
    "DequantizeLinear": "axis block_size",
    "Flatten": "axis",
    "Gather": "axis",
    "Gelu": "approximate",
    "Gemm": "alpha beta transA transB",
    "HardSigmoid": "alpha beta",
    "LayerNormalization": "axis epsilon",
    "LeakyRelu": "alpha",
    "MaxPool": f"{POOLED} dilations",
    "QuantizeLinear": "axis",
    "ReduceMean": "axes keepdims",
    "Reshape": "allowzero",
    "Shape": "start end",
    "Softmax": "axis",
    "Squeeze": "axes",
    "Transpose": "perm",
    "Unsqueeze": "axes",
}
"""Attributes that a twin heeds, by operator; the others heed none."""
NEUTRAL: Mapping[str, Any] = {
    "block_size": 0,
    "dilations": 1,
    "kernel_shape": ANY,  # of a convolution: runtimes refuse any but the weight's
    "momentum": ANY,
    "noop_with_empty_axes": 0,
    "output_dtype": 0,
    "precision": 0,
    "ratio": ANY,
    "saturate": ANY,  # of eight-bit floats, which have no twin
    "seed": ANY,
    "stash_type": 1,
    "storage_order": 0,
    "training_mode": 0,
}
"""Values of attributes that change nothing where a twin does not heed them."""


class _Halved(torch.autograd.Function):
    """Values in half precision, infinite where it has no number, gradients straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.half().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def in_halves(operator: Operator) -> Operator:
    """The operator with what it makes in half precision."""

    def run(operands: Values, attributes: Attributes) -> Any:
        made = operator(operands, attributes)
        return _Halved.apply(made) if isinstance(made, Tensor) and made.is_floating_point() else made

    return run


def unheeded(kind: str, attributes: Attributes) -> str:
    """The first attribute that an operator's twin does not heed and that changes what it does; "" = none."""
    heeded = READ.get(kind, "").split()
    for name, value in attributes.items():
        allowed = NEUTRAL.get(name)
        values = value if isinstance(value, list) else [value]
        if name not in heeded and not (allowed is ANY or all(one == allowed for one in values)):
            return name
    return ""


def check_choice(kind: str, told: Values) -> None:
    """Whether what an operator is told to take depends on sizes alone: codes that travel as floats do not.

    Raises:
        ValueError: the samples' values choose, and no gradient passes a choice.
    """
    if kind in CHOOSING.split() and any(isinstance(x, Tensor) and x.is_floating_point() for x in told):
        raise ValueError("takes what the samples choose, which has no slope")


def check_order(steps: Sequence[Step], constants: Mapping[str, Tensor]) -> None:
    """Whether what a graph makes depends neither on the order of its sums nor on what a runtime merges.

    Raises:
        ValueError: numbers so large that others are lost beside them, or a value that is rounded on one grid
            and then on another, of which runtimes leave one out.
    """
    makers = {name: step for step in steps for name in step.makes}
    for step in steps:
        for name in () if step.kind in BOUNDS else step.reads:
            value = constants.get(name)
            if value is None or not value.is_floating_point() or not value.numel():
                continue
            largest = float(value.abs().max())
            if not largest <= LARGEST:
                raise ValueError(
                    f"{step.kind} computes with {largest:.3g}: beyond {LARGEST:g} sums depend on their order"
                )
        before = makers.get(step.reads[0]) if step.kind == "QuantizeLinear" else None
        while before is not None and before.kind in CARRYING.split():
            before = makers.get(before.reads[0])
        if before is not None and before.kind == "DequantizeLinear":
            grids = [[constants.get(name) for name in one.reads[1:]] for one in (before, step)]
            if not _alike(*grids):
                raise ValueError("a rounded value is rounded again")


def _alike(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether two grids are known and the same, so that the second rounding changes nothing."""
    pairs = zip(one, other, strict=False)
    same = all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
    return same and len(one) == len(other)


def types_made(kind: str, attributes: Attributes, reads: list[int]) -> tuple[int, ...]:
    """Types of what a node makes from types that it reads, by the numbers of ONNX.

    Raises:
        ValueError: arithmetic that ends otherwise in torch, in words.
    """
    narrow = next((one for one in reads if one not in COUNTED), None)
    if narrow is not None and kind not in MOVED.split():
        raise ValueError(f"computes with values of type {TensorProto.DataType.Name(narrow)}")
    if kind == "Cast":
        to = int(attributes["to"])
        if reads[0] in FLOATS and to not in (*FLOATS, TensorProto.BOOL):
            raise ValueError("of floats to integers, which overflow differently in every runtime")
        if reads[0] == TensorProto.BOOL and to not in (*FLOATS, TensorProto.BOOL):
            raise ValueError("of truths to integers, which would be floats in the twin")
        return (to,)
    match kind:
        case "ConvInteger" | "MatMulInteger":
            return (TensorProto.INT32,)
        case "DequantizeLinear":
            return (reads[1],)
        case "DynamicQuantizeLinear":
            return (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
        case "QuantizeLinear":
            return (reads[2] if len(reads) > 2 else TensorProto.UINT8,)
        case "Shape":
            return (TensorProto.INT64,)
        case _:
            return (reads[0],)
