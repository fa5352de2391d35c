"""A stranger's ONNX file, looked at before ONNX Runtime opens it: what it claims must be what it holds.

One file with no reference to any other, no tensor larger than its bytes, nothing endless and nothing random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from secure_export.errors import LoadError
from secure_export.words import printable

LARGEST = 2**31 - 1
"""Bytes that one protobuf message can hold."""
MESSAGES = 500_000
"""Parts that a file may have; the largest networks have some ten thousand. Parsing costs memory per part."""
DEPTH = 40
ENDLESS = ("Loop", "Scan", "SequenceMap", "BeamSearch", "GreedySearch", "WhisperBeamSearch")
RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Sampling",
)
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""ONNX's own operators and those that ONNX Runtime adds; what others keep between calls is not known."""
STORED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
WIRE_BYTES = {1: 8, 5: 4}
"""Length of the fixed wire types."""
ONE_FILE = "write it as one file: onnx.save(onnx.load(path), new_path, save_as_external_data=False)"

DENSE = "store them as plain initializers"


def read(path: Path) -> bytes:
    """The file's bytes, which everything after speaks of.

    Raises:
        LoadError: no such file, not a plain file, or larger than a protobuf message can be.
    """
    if not path.exists():
        raise LoadError(f"no such artifact: {path}")
    if not path.is_file():
        raise LoadError(f"{path} is no plain file", hint="give the .onnx file")
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise LoadError(f"{path.name} has {size} bytes, an ONNX file at most {LARGEST}")
        with path.open("rb") as file:
            return file.read(LARGEST + 1)
    except (OSError, MemoryError) as error:
        raise LoadError(f"{path} cannot be read ({type(error).__name__})") from error


def parsed(content: bytes, name: str) -> onnx.ModelProto:
    """The graph in `content`, after every check; `name` is the file's, for messages.

    Raises:
        LoadError: no ONNX file, or one that claims, refers to or does what a classifier's file need not.
    """
    # ONNX Runtime tells its own format by these bytes, and would then run what was never looked at.
    if content[4:8] == b"ORTM":
        raise LoadError(f"{name} is in ONNX Runtime's own format, expected .onnx", hint="give the .onnx file")
    count_messages(content, name)
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except (DecodeError, MemoryError) as error:
        raise LoadError(f"{name} is no valid ONNX file: damaged or cut short") from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise LoadError(f"{name} is no valid ONNX file: it holds no graph")
    if proto.functions:
        raise LoadError(
            f"{name} defines functions of its own, which can unfold without bound",
            hint="inline them: onnx.inliner.inline_local_functions",
        )
    check_graph(proto.graph, name, frozenset())
    return proto


def count_messages(content: bytes, name: str) -> None:
    """Walk the wire format without building anything: two bytes of file can become a hundred of memory.

    Raises:
        LoadError: not the wire format of a ModelProto, too many parts, or nested too deeply.
    """
    view, budget = memoryview(content), [MESSAGES]
    try:
        _walk(view, onnx.ModelProto.DESCRIPTOR, budget, DEPTH)
    except (IndexError, ValueError) as error:
        raise LoadError(f"{name} is no valid ONNX file: {error or 'cut short'}") from error
    if budget[0] < 0:
        raise LoadError(f"{name} has more than {MESSAGES} parts, which no classifier has")


def _walk(view: memoryview, descriptor: Descriptor, budget: list[int], depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deeply")
    fields = descriptor.fields_by_number
    at, end = 0, len(view)
    while at < end and budget[0] >= 0:
        budget[0] -= 1
        tag, at = _varint(view, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(view, at)
        elif wire == 2:
            length, at = _varint(view, at)
            if length > end - at:
                raise ValueError("cut short")
            field = fields.get(tag >> 3)
            if field is not None and field.message_type is not None:
                _walk(view[at : at + length], field.message_type, budget, depth - 1)
            at += length
        elif wire in WIRE_BYTES:
            at += WIRE_BYTES[wire]
        else:
            raise ValueError("no protobuf message")
    if at > end:
        raise ValueError("cut short")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("no protobuf message")


def check_graph(graph: onnx.GraphProto, name: str, outer: frozenset[str]) -> None:
    """Nodes in an order in which each finds its inputs, tensors as large as they claim; subgraphs too.

    Raises:
        LoadError: a cycle, an endless or random operator, or a tensor that is not what it claims to be.
    """
    if graph.sparse_initializer:
        raise LoadError(f"{name} holds sparse weights, which unfold to any size", hint=DENSE)
    for tensor in graph.initializer:
        check_tensor(tensor, name)
    known = set(outer)
    known.update(value.name for value in graph.input)
    known.update(tensor.name for tensor in graph.initializer)
    for node in graph.node:
        what = f"{printable(node.op_type)} {printable(node.name)!r}"
        if node.op_type in ENDLESS:
            raise LoadError(f"{name}: {what} may never end, which cannot be measured", hint="unroll it")
        if node.op_type in RANDOM:
            raise LoadError(f"{name}: {what} is random: what is measured is not what runs")
        if node.domain not in DOMAINS:
            raise LoadError(f"{name}: {what} is of domain {printable(node.domain)!r}, which is not known")
        if trains(node):
            raise LoadError(
                f"{name}: {what} is in training mode: what it does depends on calls before or samples beside",
                hint="export the model in eval mode",
            )
        for value in node.input:
            if value and value not in known:
                raise LoadError(
                    f"{name}: {what} reads {printable(value)!r}, which nothing before it makes "
                    "(a cycle, or a wrong name)"
                )
        if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
            raise LoadError(f"{name}: {what} holds sparse weights, which unfold to any size", hint=DENSE)
        for part in _parts(node):
            if isinstance(part, onnx.GraphProto):
                check_graph(part, name, frozenset(known))
            else:
                check_tensor(part, name)
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            raise LoadError(f"{name}: nothing makes the output {printable(value.name)!r}")


def trains(node: onnx.NodeProto) -> bool:
    """Whether the node draws masks, of which a session makes other ones with each call, or batch statistics.

    The switch may be a value that the graph computes, so one that is there at all is taken for on.
    """
    if node.op_type == "Dropout":
        return len(node.input) > 2 and bool(node.input[2])
    return "Dropout" in node.op_type or any(a.name == "training_mode" and a.i for a in node.attribute)


def _parts(node: onnx.NodeProto) -> Iterator[Any]:
    """Graphs and tensors in a node's attributes."""
    for attribute in node.attribute:
        yield from attribute.graphs
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield attribute.g
        if attribute.HasField("t"):
            yield attribute.t


def check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    """Refuse a tensor whose values lie elsewhere, or that claims more values than it stores.

    Raises:
        LoadError: as said; the message names tensor, place and size.
    """
    what = f"{name}: tensor {printable(tensor.name)!r}"
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        raise LoadError(f"{what} lies in another file ({printable(place)!r})", hint=ONE_FILE)
    if any(size < 0 for size in tensor.dims):
        raise LoadError(f"{what} has a negative size")
    claimed = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        # Four values a byte is the densest of ONNX's types.
        stored = 4 * len(tensor.raw_data)
    else:
        stored = 8 * sum(len(getattr(tensor, field)) for field in STORED)
    if claimed > stored:
        raise LoadError(f"{what} claims {claimed} values and stores far fewer: the file does not hold them")
