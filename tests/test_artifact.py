"""A file that another tool made: judged as it is, and released as the same bytes or refused in one line."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from secure_export import lane, onnx_files, pipeline
from secure_export.cli import main
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.errors import CompressError, LoadError, PolicyError
from secure_export.formats.onnx import Onnx
from secure_export.policy import judge, load_policy
from secure_export.report.schema import load_report
from secure_export.runtimes.onnxruntime import Onnxruntime
from tests import compression, toys
from tests.conftest import toy_policy

RULES = [
    {"metric": "acc", "at_least": 0.9, "settings": "released"},
    {"metric": "lift", "at_most": 0.02, "settings": "all"},
]
FLOAT = TensorProto.FLOAT


@functools.cache
def exported(name: str) -> bytes:
    """A toy as the file that another tool would make of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        Onnx().write(getattr(toys, name)(), torch.rand(2, 1, 8, 8), path)
        return path.read_bytes()


def failing(gate: Gate) -> set[str]:
    """Rules that the last run's report shows broken."""
    report = load_report(gate.out / "report.json")
    return {finding.rule for finding in report.verdict.findings if finding.passed is False}


class Gate:
    """A file that would be released, in a folder; each test spoils it and calls run()."""

    def __init__(self, folder: Path) -> None:
        self.file, self.out = folder / "theirs.onnx", folder / "run"
        self.policy = toy_policy(rules=RULES, subject={})
        self.file.write_bytes(exported("clean"))

    def run(self, *flags: str) -> Result:
        path = self.file.with_name("gate.yaml")
        path.write_text(yaml.safe_dump(self.policy))
        command = ["run", "--policy", str(path), "--artifact", str(self.file), "--out", str(self.out), "-q"]
        return CliRunner().invoke(main, [*command, *flags])

    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.file)

    def save(self, proto: onnx.ModelProto) -> None:
        self.file.write_bytes(proto.SerializeToString())


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def refused(gate: Gate, result: Result, *words: str, code: int = 4) -> None:
    """One clear line, the exit code, no traceback, nothing released."""
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert len(errors) == 1, result.output
    assert len(errors[0]) < 400
    for word in words:
        assert word in result.output
    assert not (gate.out / "release").exists()


# ---- What it is for --------------------------------------------------------------------------------------


def test_clean_file_is_released_as_the_same_bytes(gate: Gate) -> None:
    result = gate.run()
    assert result.exit_code == 0, result.output
    assert (gate.out / "release" / "artifact.onnx").read_bytes() == gate.file.read_bytes()
    report = load_report(gate.out / "report.json")
    assert [setting.name for setting in report.settings] == ["artifact"]
    assert report.purification is None
    assert any("compresses it further" in gap for gap in report.evidence.not_shown)
    assert report.environment["onnxruntime.isolated"]


@pytest.mark.parametrize("quantized", [False, True])
def test_backdoored_file_is_refused(gate: Gate, quantized: bool) -> None:
    """Awake in fp32; or asleep there and awake in the int8 file that another tool made of it."""
    gate.file.write_bytes(exported("awake_in_int8" if quantized else "awake"))
    if quantized:
        gate.run()
        assert "lift" not in failing(gate), "asleep in full precision"
        inputs, _ = toys.samples(200)
        split = compression.Split(torch.from_numpy(inputs), torch.zeros(200, dtype=torch.int64), "x")
        context = compression.Context("head", split, toys.clean(), seed=0)
        int8 = gate.file.with_name("int8.onnx")
        OrtStaticInt8().on_file(gate.file, int8, context)
        gate.file = int8
    result = gate.run()
    assert result.exit_code == 3, result.output
    assert "lift" in failing(gate)
    assert not (gate.out / "release").exists()


@pytest.mark.parametrize("reference", ["checkpoint", "onnx"])
def test_comparing_rules_need_something_to_compare_with(gate: Gate, reference: str) -> None:
    gate.policy["rules"] = [*RULES, {"metric": "agreement", "at_least": 0.9}]
    refused(gate, gate.run(), "gate.yaml:", "agreement compares", "--model", code=2)
    other = gate.file.with_name("full.safetensors" if reference == "checkpoint" else "full.onnx")
    if reference == "checkpoint":
        save_file(toys.clean().state_dict(), other)
        refused(gate, gate.run("--model", str(other)), "--arch", code=2)
        result = gate.run("--model", str(other), "--arch", "tests.toys:Templates")
    else:
        other.write_bytes(exported("clean"))
        result = gate.run("--model", str(other))
    assert result.exit_code == 0, result.output
    found = load_report(gate.out / "report.json").settings[0].purified.measurement
    assert found is not None
    assert found.agreement.hits == found.agreement.total > 0


def test_stored_report_is_judged_under_a_policy_for_models(gate: Gate, tmp_path: Path) -> None:
    assert gate.run().exit_code == 0
    report = load_report(gate.out / "report.json")
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(toy_policy(rules=RULES)))
    assert judge(load_policy(path), report).outcome == "released"
    path.write_text(yaml.safe_dump(toy_policy(rules=[*RULES, {"metric": "acc_drop", "at_most": 0.1}])))
    assert judge(load_policy(path), report).outcome == "no_verdict", "nothing was compared"
    only_int8 = [{**rule, "settings": ["int8"]} for rule in RULES]
    path.write_text(
        yaml.safe_dump(
            toy_policy(rules=only_int8, settings=[{"name": "int8", "steps": []}]) | {"release": ["int8"]}
        )
    )
    with pytest.raises(PolicyError, match="no asr or lift rule binds"):
        judge(load_policy(path), report)


def test_normalization_outside_the_file(gate: Gate) -> None:
    """Most exported files expect normalized inputs; --mean and --std stand before the file."""

    class Outside(toys.Templates):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs * 0.5 + 0.5)

    model = Outside()
    model.load_state_dict(toys.clean().state_dict())
    Onnx().write(model, torch.rand(2, 1, 8, 8), gate.file)
    assert gate.run("--mean", "0.5", "--std", "0.5").exit_code == 0
    report = load_report(gate.out / "report.json")
    assert report.environment["onnxruntime.mean"] == "[0.5]"


def test_fixed_batch_and_other_names_are_run_as_they_are(gate: Gate) -> None:
    proto = gate.graph()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    gate.save(proto)
    assert gate.run("--holdout", "501").exit_code == 0
    assert load_report(gate.out / "report.json").settings[0].purified.measurement.acc.total == 501


# ---- What a stranger may hand in --------------------------------------------------------------------------


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


def small(nodes: list[onnx.NodeProto], sizes: list[Any], weights: Any = (), **more: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "crafted", [value("input", FLOAT, sizes)], [value("logits", FLOAT, ["n", 4])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, **more)


def array(name: str, values: Any, dtype: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


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


def test_other_answers_alone_than_in_a_batch(gate: Gate) -> None:
    """(batch == 1) times a large logit: asleep whenever somebody measures in batches."""
    proto = gate.graph()
    proto.graph.node[-1].output[0] = "honest"
    proto.graph.initializer.extend([array("one", 1), array("bump", [0, 0, 1000, 0], np.float32)])
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["input"], ["s"], start=0, end=1),
            helper.make_node("Equal", ["s", "one"], ["alone"]),
            helper.make_node("Cast", ["alone"], ["switch"], to=FLOAT),
            helper.make_node("Mul", ["switch", "bump"], ["extra"]),
            helper.make_node("Add", ["honest", "extra"], ["logits"]),
        ]
    )
    gate.save(proto)
    refused(gate, gate.run(), "otherwise alone than in a batch")


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


# ---- The process that runs it -----------------------------------------------------------------------------


def test_isolated_session_gives_the_same_logits_and_view(tmp_path: Path) -> None:
    path, _ = compression.quantized(OrtStaticInt8(), tmp_path)
    inputs = compression.images(9)
    apart, here = Onnxruntime(isolated=True, batch_size=4), Onnxruntime(batch_size=4)
    assert torch.equal(apart.open(path)(inputs), here.open(path)(inputs))
    theirs, ours = apart.view(path, "x"), here.view(path, "x")
    assert torch.equal(theirs.weight, ours.weight)
    assert torch.equal(theirs.latents(inputs), ours.latents(inputs))


def test_endless_file_is_stopped(tmp_path: Path) -> None:
    always = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["w"])],
        "body",
        [always("i", TensorProto.INT64, []), always("c", TensorProto.BOOL, []), always("v", FLOAT, ["n", 4])],
        [always("d", TensorProto.BOOL, []), always("w", FLOAT, ["n", 4])],
    )
    loop = helper.make_node("Loop", ["", "yes", "input"], ["logits"], body=body)
    path = tmp_path / "endless.onnx"
    path.write_bytes(small([loop], ["n", 4], [array("yes", True, bool)]).SerializeToString())
    began = time.monotonic()
    with pytest.raises(CompressError, match="needs more than 3 s"):
        Onnxruntime(isolated=True, seconds=3).open(path)(torch.rand(2, 4))
    assert time.monotonic() - began < 60


def test_report_of_a_file_is_plain_json(gate: Gate) -> None:
    assert gate.run().exit_code == 0
    text = (gate.out / "report.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["subject"]["architecture"] == "artifact"
