"""Whether samples of one batch can meet in a graph: looked at node by node, for every batch size at once.

A file that takes any number of samples can wake by how many there are, or by what lies beside; no
measurement in one size speaks of another. Where every node works on rows alone, it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secure_export import twins
from secure_export.errors import CompressError
from secure_export.words import printable

if TYPE_CHECKING:
    from torch import Tensor

    from secure_export.twins import Step, Twin

PROBED = 2
"""Samples that run once, for the sizes of what lies between; what is shown holds for any number."""
SIZES_KEPT = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Rows:
    """A tensor [N, ...] whose every row is made from its own sample alone; its other sizes are fixed."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that the graph reads off such a tensor; None is the number of samples."""

    entries: tuple[int | None, ...]


Kind = Rows | Sizes | None
"""None: a constant."""


@dataclass(frozen=True)
class Node:
    """One step as it is looked at: kinds and values (in one run) of what it reads, and what it makes."""

    step: Step
    kinds: Sequence[Kind]
    read: Sequence[Tensor | None]
    made: Tensor
    batch: int
    """0 = any number."""

    @property
    def data(self) -> Tensor:
        """The first operand."""
        first = self.read[0]
        return self.made if first is None else first

    @property
    def parameters(self) -> bool:
        """Whether the first operand alone is rows."""
        return isinstance(self.kinds[0], Rows) and not any(self.kinds[1:])

    def attribute(self, name: str, default: int) -> int:
        """A number among the attributes."""
        return int(self.step.attributes.get(name, default))

    def inside(self, axis: int) -> bool:
        """Whether an axis of the first operand, counted from either end, is not the batch's."""
        return axis % self.data.ndim != 0

    def axes(self) -> list[int]:
        """Those that an operand or an attribute names; none where it is all that are left out."""
        if len(self.read) > 1 and self.read[1] is not None:
            return _numbers(self.read[1])
        return [int(axis) for axis in self.step.attributes.get("axes") or ()]


def mixing_of(path: Path, form: str, shape: Sequence[int]) -> str:
    """Where samples of one batch may meet in a file's graph; "" where they cannot, or where a batch is one.

    Files of other formats than ONNX are traced from the user's own architecture and are not looked at.
    """
    if form != "onnx":
        return ""
    try:
        proto = twins.read(path)
        return "" if twins.batch_of(proto) == 1 else mixing(twins.Twin(proto, path.name), shape)
    except CompressError as error:
        return f"not known: {error.message}"


def mixing(twin: Twin, shape: Sequence[int]) -> str:
    """Where samples of one batch may meet, in words; "" if they cannot, however many there are.

    `shape` is that of one input.

    Raises:
        CompressError: the graph cannot be computed.
    """
    kinds: dict[str, Kind] = {twin.input: Rows()}
    with torch.no_grad():
        values = twin.values(torch.zeros(twin.batch or PROBED, *shape))
    for step in twin.steps:
        read = [values[name] if name else None for name in step.reads]
        node = Node(step, [kinds.get(name) for name in step.reads], read, values[step.makes[0]], twin.batch)
        found = _kind(node)
        if isinstance(found, str):
            return f"{step.kind} {printable(step.makes[0])!r} {found}"
        kinds[step.makes[0]] = found
    return "" if isinstance(kinds.get(twin.output), Rows) else "the output holds no row for every sample"


def _kind(node: Node) -> Kind | str:
    """What a node makes, or why it is not shown to keep samples apart."""
    kind = node.step.kind
    if kind == "Reshape" and isinstance(node.kinds[0], Rows):
        return Rows() if _reshaped(node) else "is not shown to leave every sample its own row"
    if kind == "Expand" and not isinstance(node.kinds[0], Sizes):
        return Rows() if _expanded(node) else "is not shown to give every sample its own row"
    if any(isinstance(one, Sizes) for one in node.kinds):
        return _sizes(node) or "computes with the number of samples"
    if not any(node.kinds):
        return None
    if kind == "Shape":
        every = (None, *node.data.shape[1:])
        return Sizes(every[node.attribute("start", 0) : node.step.attributes.get("end")])
    if kind == "DynamicQuantizeLinear":
        return "takes its scale from the whole batch"
    rule = RULES.get(kind)
    return Rows() if rule is not None and rule(node) else "is not shown to keep samples apart"


def _sizes(node: Node) -> Sizes | None:
    """Sizes that are taken out, put together or carried on, and nothing else."""
    first, *others = node.kinds
    if node.step.kind == "Concat":
        every = zip(node.kinds, node.read, strict=True)
        parts = [one.entries if isinstance(one, Sizes) else _numbers(value) for one, value in every]
        return Sizes(tuple(entry for part in parts for entry in part))
    if not isinstance(first, Sizes) or any(others):
        return None
    if node.step.kind == "Gather":
        return Sizes(tuple(first.entries[i % len(first.entries)] for i in _numbers(node.read[1])))
    return first if node.step.kind in SIZES_KEPT else None


def _numbers(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(number) for number in value.reshape(-1)]


def _wanted(node: Node) -> Sequence[int | None]:
    """The sizes that the second operand asks for."""
    sizes = node.kinds[1]
    return sizes.entries if isinstance(sizes, Sizes) else _numbers(node.read[1])


def _expanded(node: Node) -> bool:
    """Rows among themselves, or constants that are the same for all of them."""
    first, *rest = _wanted(node) or [0]
    rows = isinstance(node.kinds[0], Rows)
    if any(size is None for size in rest) or len(rest) + 1 != node.made.ndim:
        return False
    if rows:
        return node.data.ndim == node.made.ndim and first in (None, 1)
    return first is None and (node.data.ndim < node.made.ndim or node.data.shape[0] == 1)


def _reshaped(node: Node) -> bool:
    """Whether the first size is the batch's, and the others are of one sample."""
    first, *rest = _wanted(node) or [1]
    left_over = first in (None, -1, node.batch or None) or (first == 0 and not node.attribute("allowzero", 0))
    same = node.made.shape[1:].numel() == node.data.shape[1:].numel()
    return left_over and same and not any(size is None for size in rest)


def _row_by_row(node: Node) -> bool:
    """Rows of one rank, and constants that are the same for all of them."""
    rank = node.made.ndim
    return all(
        value is None
        or (value.ndim == rank if isinstance(kind, Rows) else value.ndim < rank or value.shape[0] == 1)
        for kind, value in zip(node.kinds, node.read, strict=True)
    )


def _on_a_grid(node: Node) -> bool:
    """A scale and zero point for all values, or for each place along another axis."""
    scale = node.read[1]
    if scale is None or node.attribute("block_size", 0):
        return False
    return node.parameters and (scale.numel() == 1 or node.inside(node.attribute("axis", 1)))


def _windowed(node: Node) -> bool:
    """Over channels and places: the first axis is the batch by the operator's definition."""
    return node.parameters and node.data.ndim > 1


def _gemm(node: Node) -> bool:
    bias = node.read[2] if len(node.read) > 2 else None
    same = bias is None or bias.ndim < 2 or bias.shape[0] == 1
    return node.parameters and not node.attribute("transA", 0) and same


def _product(node: Node) -> bool:
    """Rows times constants, or sample by sample."""
    ranks = [0 if value is None else value.ndim for value in node.read]
    if len(node.read) > 2 and node.read[2] is not None and node.read[2].numel() != 1:
        return False  # A zero point for every row.
    if all(isinstance(kind, Rows) for kind in node.kinds):
        return ranks[0] == ranks[1] > 2
    if node.parameters:
        return ranks[0] > 1 and ranks[1] <= 2
    return isinstance(node.kinds[1], Rows) and ranks[1] > 2 and ranks[0] == 2


def _over_axes(node: Node) -> bool:
    return node.parameters and bool(node.axes()) and all(map(node.inside, node.axes()))


def _unsqueezed(node: Node) -> bool:
    return node.parameters and all(axis % node.made.ndim != 0 for axis in node.axes())


def _normalized(default: int) -> Callable[[Node], bool]:
    return lambda node: node.parameters and node.inside(node.attribute("axis", default))


def _joined(node: Node) -> bool:
    return all(isinstance(kind, Rows) for kind in node.kinds) and node.inside(node.attribute("axis", 0))


def _sliced(node: Node) -> bool:
    named = node.read[3] if len(node.read) > 3 else None
    axes = _numbers(named) if named is not None else [0]
    return node.parameters and all(map(node.inside, axes))


def _gathered(node: Node) -> bool:
    return node.parameters and node.inside(node.attribute("axis", 0))


ROW_BY_ROW = (
    "Add Cast Clip Div Dropout Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Mul Neg Pow Relu "
    "Sigmoid Sqrt Sub Tanh"
)
WINDOWED = "AveragePool BatchNormalization Conv ConvInteger GlobalAveragePool MaxPool"
RULES: Mapping[str, Callable[[Node], bool]] = {
    **dict.fromkeys(ROW_BY_ROW.split(), _row_by_row),
    **dict.fromkeys(WINDOWED.split(), _windowed),
    "Concat": _joined,
    "DequantizeLinear": _on_a_grid,
    "Flatten": lambda node: node.parameters and node.attribute("axis", 1) % node.data.ndim == 1,
    "Gather": _gathered,
    "Gemm": _gemm,
    "LayerNormalization": _normalized(-1),
    "MatMul": _product,
    "MatMulInteger": _product,
    "QuantizeLinear": _on_a_grid,
    "ReduceMean": _over_axes,
    "Slice": _sliced,
    "Softmax": _normalized(-1),
    "Squeeze": _over_axes,
    "Transpose": lambda node: node.parameters and node.step.attributes["perm"][0] == 0,
    "Unsqueeze": _unsqueezed,
}
"""Of operators that have a twin, whether a node keeps samples apart."""
