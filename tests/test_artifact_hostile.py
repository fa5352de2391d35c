"""What a stranger may hand in as an artifact: one clear line, exit 4, nothing released, memory bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from secure_export import lane, onnx_files, pipeline
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.errors import LoadError
from secure_export.policy import judge
from tests import compression, toys
from tests.gating import FLOAT, Gate, array, exported, refused, small


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_altered_after_measurement(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(policy: Any, report: Any) -> Any:
        (copy,) = (gate.out / "work").glob("artifact-*.onnx")
        copy.write_bytes(copy.read_bytes()[:-1] + b"\0")
        return judge(policy, report)

    monkeypatch.setattr(pipeline, "judge", tamper)
    refused(gate, gate.run(), "sha256", "expected")


def test_altered_while_measured(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = lane.measure

    def tamper(*given: Any, **options: Any) -> Any:
        (copy,) = (gate.out / "work").glob("artifact-*.onnx")
        copy.write_bytes(copy.read_bytes() + b"\0")
        return measure(*given, **options)

    monkeypatch.setattr(lane, "measure", tamper)
    refused(gate, gate.run(), "changed while it was measured")


def test_wrong_input_name(gate: Gate) -> None:
    proto = gate.graph()
    proto.graph.input[0].name = "picture"
    gate.save(proto)
    refused(gate, gate.run(), "theirs.onnx", "which nothing before it makes")


def test_input_that_nothing_reads(gate: Gate) -> None:
    proto = gate.graph()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 8, 8), np.float32), "constant"))
    for node in proto.graph.node:
        node.input[:] = ["constant" if name == "input" else name for name in node.input]
    gate.save(proto)
    refused(gate, gate.run(), "nothing reads the input")


@pytest.mark.parametrize("location", ["../../x", "/etc/passwd", "weights.bin", "../../x\n\x1b[31m"])
def test_external_data(gate: Gate, location: str) -> None:
    proto = gate.graph()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    gate.save(proto)
    refused(gate, gate.run(), "lies in another file", "save_as_external_data=False")


@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_initializer_that_claims_ten_gigabytes(gate: Gate, place: str) -> None:
    proto = gate.graph()
    huge = TensorProto(name="huge", data_type=FLOAT, dims=[2_500_000_000], raw_data=b"\0" * 64)
    if place == "initializer":
        proto.graph.initializer.append(huge)
    else:
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=huge))
    gate.save(proto)
    refused(gate, gate.run(), "'huge' claims 2500000000 values")


@pytest.mark.parametrize("how", ["two", "itself"])
def test_cyclic_graph(gate: Gate, how: str) -> None:
    proto = gate.graph()
    names = ["a", "b"] if how == "two" else ["a", "a"]
    for made, read in {names[0]: names[1], names[1]: names[0]}.items():
        proto.graph.node.insert(0, helper.make_node("Add", ["input", read], [made]))
    gate.save(proto)
    refused(gate, gate.run(), "a cycle")


def test_shapes_that_take_all_memory(gate: Gate) -> None:
    """12 TB of zeros, asked for by 3 integers: the process that runs the file is stopped, not this one."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["x"], keepdims=0),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Add", ["zeros", "x"], ["y"]),
        helper.make_node("Reshape", ["y", "out"], ["logits"]),
    ]
    gate.save(small(nodes, ["n", 1, 8, 8], [array("size", [3_000_000_000_000]), array("out", [-1, 4])]))
    refused(gate, gate.run(), "ONNX Runtime cannot")


def test_shape_that_grows_with_the_batch(gate: Gate) -> None:
    """Logits for more samples than were asked for."""
    nodes = [helper.make_node("Reshape", ["input", "out"], ["logits"])]
    gate.save(small(nodes, ["n", 1, 8, 8], [array("out", [-1, 4])]))
    refused(gate, gate.run(), "expected [48, classes]")


@pytest.mark.parametrize(
    ("size", "how"), [(1, "alone than in a batch"), (2, "in batches of 2"), (32, "in batches of 32")]
)
def test_other_answers_in_batches_of_one_size(gate: Gate, size: int, how: str) -> None:
    """(batch == size) times a large logit: asleep whenever somebody measures in other batches."""
    proto = gate.graph()
    proto.graph.node[-1].output[0] = "honest"
    proto.graph.initializer.extend([array("size", size), array("bump", [0, 0, 1000, 0], np.float32)])
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["input"], ["s"], start=0, end=1),
            helper.make_node("Equal", ["s", "size"], ["this"]),
            helper.make_node("Cast", ["this"], ["switch"], to=FLOAT),
            helper.make_node("Mul", ["switch", "bump"], ["extra"]),
            helper.make_node("Add", ["honest", "extra"], ["logits"]),
        ]
    )
    gate.save(proto)
    refused(gate, gate.run(), f"otherwise {how}")


def test_backdoor_that_is_awake_in_batches_of_one_size(gate: Gate) -> None:
    """The channel that carries the known trigger passes in batches of 32 alone; clean answers stay."""
    gate.file.write_bytes(exported("awake"))
    gate.save(
        behind_the_relu(
            gate.graph(),
            [array("size", [32])],
            helper.make_node("Shape", ["input"], ["s"], start=0, end=1),
            helper.make_node("Equal", ["s", "size"], ["this"]),
            helper.make_node("Cast", ["this"], ["switch"], to=FLOAT),
        )
    )
    refused(gate, gate.run(), "in batches of 32")


def test_backdoor_that_wakes_after_a_number_of_calls(gate: Gate) -> None:
    """A seeded Dropout in training mode is a counter of calls, which begins anew with every session."""
    gate.file.write_bytes(exported("awake"))
    gate.save(
        behind_the_relu(
            gate.graph(),
            [array("one", [1.0], np.float32), array("ratio", 0.01, np.float32), array("yes", True, bool)],
            helper.make_node("Dropout", ["one", "ratio", "yes"], ["switch"], seed=7),
        )
    )
    refused(gate, gate.run(), "training mode")


def behind_the_relu(proto: onnx.ModelProto, weights: list[TensorProto], *nodes: onnx.NodeProto) -> Any:
    """The backdoor's channel times what `nodes` make of `switch`."""
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    read = relu.output[0]
    relu.output[0] = "hidden"
    guard = np.zeros((1, 8, 1, 1), np.float32)
    guard[0, toys.GUARD] = 1
    masks = [array("guard", guard, np.float32), array("others", 1 - guard, np.float32)]
    proto.graph.initializer.extend([*weights, *masks])
    body = list(proto.graph.node)
    at = body.index(relu) + 1
    gated = (
        helper.make_node("Mul", ["guard", "switch"], ["open"]),
        helper.make_node("Add", ["others", "open"], ["mask"]),
        helper.make_node("Mul", ["hidden", "mask"], [read]),
    )
    del proto.graph.node[:]
    proto.graph.node.extend([*body[:at], *nodes, *gated, *body[at:]])
    return proto


@pytest.mark.parametrize(
    ("node", "word"),
    [
        (helper.make_node("BatchNormalization", ["i"] * 5, ["o"], training_mode=1), "training mode"),
        (helper.make_node("BiasDropout", ["i", "i"], ["o"], domain="com.microsoft"), "training mode"),
        (helper.make_node("Relu", ["i"], ["o"], domain="ai.onnx.preview.training"), "domain"),
    ],
)
def test_operators_that_do_not_do_the_same_each_time(node: onnx.NodeProto, word: str) -> None:
    proto = small([node], [1, 4])
    proto.graph.input[0].name = "i"
    with pytest.raises(LoadError, match=word):
        onnx_files.check_graph(proto.graph, "x.onnx", frozenset())


def test_dropout_of_an_export_for_inference_is_none() -> None:
    assert not onnx_files.trains(helper.make_node("Dropout", ["i"], ["o"]))
    assert not onnx_files.trains(helper.make_node("Dropout", ["i", "ratio", ""], ["o"]))


def test_inputs_of_another_size(gate: Gate) -> None:
    gate.save(
        small(
            [helper.make_node("Reshape", ["input", "o"], ["logits"])], ["n", 3, 32, 32], [array("o", [-1, 4])]
        )
    )
    refused(gate, gate.run(), "takes inputs of [3, 32, 32], the data has [1, 8, 8]", "data.resize")


@pytest.mark.parametrize("operator", ["Loop", "RandomUniformLike"])
def test_operators_without_an_end_or_without_a_meaning(gate: Gate, operator: str) -> None:
    proto = gate.graph()
    node = helper.make_node(operator, ["input"] if operator != "Loop" else ["", ""], ["x"])
    proto.graph.node.insert(0, node)
    gate.save(proto)
    refused(gate, gate.run(), operator)


def test_functions_are_refused(gate: Gate) -> None:
    proto = gate.graph()
    proto.functions.append(
        helper.make_function("theirs", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [])
    )
    gate.save(proto)
    refused(gate, gate.run(), "functions of its own", "inline")


@pytest.mark.parametrize(
    "content",
    [b"", b"no ONNX at all", b"\x08\x0a", b"\x18\0\0\0ORTM" + b"\0" * 100, b"\x3a" + b"\xff" * 9 + b"\x01"],
)
def test_no_onnx_file(gate: Gate, content: bytes) -> None:
    gate.file.write_bytes(content)
    refused(gate, gate.run(), "theirs.onnx")


def test_file_cut_short(gate: Gate) -> None:
    whole = gate.file.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        gate.file.write_bytes(whole[: int(share * len(whole))])
        refused(gate, gate.run(), "theirs.onnx")


def test_missing_file(gate: Gate) -> None:
    gate.file = gate.file.with_name("gone.onnx")
    refused(gate, gate.run(), "no such artifact")


def test_many_parts_are_counted_before_they_are_built() -> None:
    """Two bytes of file an empty node: parsing 2 GB of them would take 100 GB of memory."""
    nodes = b"\x0a\x00" * (onnx_files.MESSAGES + 1)
    size = len(nodes)
    length = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
    with pytest.raises(LoadError, match="parts"):
        onnx_files.parsed(b"\x3a" + length + nodes, "bomb.onnx")


def test_deeply_nested_file() -> None:
    proto = helper.make_graph([], "g", [], [])
    for _ in range(30):
        proto = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=proto)], "g", [], [])
    model = helper.make_model(proto)
    with pytest.raises(LoadError, match="nested too deeply"):
        onnx_files.parsed(model.SerializeToString(), "deep.onnx")


def test_what_our_own_exporters_write_passes(tmp_path: Path) -> None:
    assert onnx_files.parsed(compression.exported(), "model.onnx").graph.node
    path, _ = compression.quantized(OrtStaticInt8(), tmp_path)
    assert onnx_files.parsed(path.read_bytes(), "int8.onnx").graph.node
