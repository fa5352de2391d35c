"""A file that another tool made: judged as it is, and released as the same bytes or refused in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from secure_export import pipeline
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.errors import CompressError, PolicyError, ReleaseError
from secure_export.formats.onnx import Onnx
from secure_export.policy import judge, load_policy
from secure_export.policy.check import for_artifact
from secure_export.report.schema import load_report
from secure_export.runtimes.onnxruntime import Onnxruntime
from tests import compression, toys
from tests.conftest import toy_policy
from tests.gating import FLOAT, RULES, Gate, array, exported, refused, small


def failing(gate: Gate) -> set[str]:
    """Rules that the last run's report shows broken."""
    report = load_report(gate.out / "report.json")
    return {finding.rule for finding in report.verdict.findings if finding.passed is False}


class Outside(toys.Templates):
    """Expects inputs normalized by .5 and .5."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalized images [N, 1, 8, 8] to logits [N, 4]."""
        return super().forward(inputs * 0.5 + 0.5)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


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


def test_exact_products_are_asked_for_and_said(gate: Gate) -> None:
    gate.policy["precise_int8"] = True
    assert gate.run().exit_code == 0
    report = load_report(gate.out / "report.json")
    assert report.environment["onnxruntime.precise"] == "True"
    assert any("session.x64quantprecision" in gap for gap in report.evidence.not_shown)


@pytest.mark.parametrize("compared", [False, True])
def test_costs_stand_beside_those_of_the_model_it_is_compared_with(gate: Gate, compared: bool) -> None:
    gate.policy["costs"] = True
    flags = ("--model", str(gate.file)) if compared else ()
    assert gate.run(*flags).exit_code == 0
    *before, cost = load_report(gate.out / "report.json").costs
    assert [other.setting for other in before] == (["compared with"] if compared else [])
    assert (cost.setting, cost.size, cost.why) == ("artifact", gate.file.stat().st_size, "")
    assert cost.batch_1_ms
    assert "## Costs" in (gate.out / "report.md").read_text()


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
    with pytest.raises(PolicyError, match="no asr, lift or source_lift rule on all classes binds"):
        judge(load_policy(path), report)


def test_normalization_outside_the_file(gate: Gate) -> None:
    """Most exported files expect normalized inputs; --mean and --std stand before the file."""
    model = Outside()
    model.load_state_dict(toys.clean().state_dict())
    Onnx().write(model, torch.rand(2, 1, 8, 8), gate.file)
    assert gate.run("--mean", "0.5", "--std", "0.5").exit_code == 0
    report = load_report(gate.out / "report.json")
    assert report.environment["onnxruntime.mean"] == "[0.5]"
    assert report.overrides["subject.mean"] == [0.5]
    assert not {"subject.artifact", "subject.model", "data.path"} & report.overrides.keys()


FOUND = {
    "preset": None,
    "probes": [{"kind": "patch", "area": 0.0625, "steps": 30, "images": 8}],
    "samples": 300,
    "rounding": False,
    "rules": [{"metric": "inverted_lift", "at_most": 0.4}],
}
ELSEWHERE = {"kind": "badnets", "name": "corner", "size": 1, "position": "bottom-right", "pattern": "white"}
"""A trigger that nobody planted."""
DEAF = {"kind": "latent-shift", "min_score": 0.9}


def blind(gate: Gate) -> None:
    """Let the search alone see the backdoor."""
    locate = {"methods": [DEAF], "decisive": ["latent-shift"], "unconfirmed": "accept"}
    gate.policy |= {"triggers": [ELSEWHERE], "evidence": FOUND, "locate": locate}


def test_a_search_behind_another_normalization_is_not_taken_over(gate: Gate) -> None:
    """Behind the wrong one every pixel is faint, and the backdoor's channel, with its bias, stays shut."""
    blind(gate)
    state = toys.awake().state_dict()
    state["conv.bias"][toys.GUARD] = -0.02
    model = Outside()
    model.load_state_dict(state)
    Onnx().write(model, torch.rand(2, 1, 8, 8), gate.file)
    assert gate.run("--mean", "40", "--std", "40").exit_code == 0
    result = gate.run("--mean", "0.5", "--std", "0.5")
    assert result.exit_code == 3, result.output
    assert failing(gate) == {"inverted_lift"}


def behind_stairs(proto: onnx.ModelProto, around: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Every pixel rounded to one of 32 levels by operators whose gradient is zero; `around` makes `faint`."""
    levels = np.arange(32, dtype=np.float32)
    for node in proto.graph.node:
        node.input[:] = ["stairs" if name == "input" else name for name in node.input]
    proto.graph.initializer.extend(
        [
            array("ones", np.ones((32, 1, 1, 1)), np.float32),
            array("levels", -(levels + 0.5) / 32, np.float32),
            array("mean", np.full((1, 32, 1, 1), 1 / 32), np.float32),
            array("little", -1e-3, np.float32),
        ]
    )
    made = [
        helper.make_node("Conv", ["input", "ones", "levels"], ["above"]),
        helper.make_node("Relu", ["above"], ["over"]),
        helper.make_node("Cast", ["over"], ["bits"], to=TensorProto.BOOL),
        helper.make_node("Cast", ["bits"], ["counted"], to=FLOAT),
        helper.make_node("Conv", ["counted", "mean"], ["level"]),
        *around,
        helper.make_node("Mul", ["faint", "little"], ["fainter"]),
        helper.make_node("Add", ["level", "fainter"], ["stairs"]),
    ]
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    return proto


@pytest.mark.parametrize("around", ["Identity", "Sign"], ids=["against the slope", "no twin"])
def test_a_file_that_hides_its_gradient_is_not_released(gate: Gate, around: str) -> None:
    """Its twin agrees with it on every sample and leads searches along a slope that is none of the file's."""
    blind(gate)
    gate.save(behind_stairs(gate.graph(), [helper.make_node(around, ["input"], ["faint"])]))
    result = gate.run()
    assert result.exit_code == 4, result.output
    assert "searched by queries alone" in result.output
    report = load_report(gate.out / "report.json")
    assert not any(search.gradient for search in report.evidence.searches)
    gate.policy["evidence"] = FOUND | {"queries": True}
    assert gate.run().exit_code == (0 if around == "Identity" else 4)
    gate.policy["evidence"] = FOUND | {"queries": True, "mixing": True}
    assert gate.run().exit_code == 0


def behind_a_step(proto: onnx.ModelProto, step: str) -> onnx.ModelProto:
    """A checkered square of four pixels compared with a number: class 1 where it is met, nothing below."""
    seen = np.zeros((1, 1, 8, 8), np.float32)
    seen[0, 0, 1:3, 4:6] = 1000, -1000
    seen[0, 0, 2, 4:6] = -1000, 1000
    head = proto.graph.node[-1]
    weight = next(w for w in proto.graph.initializer if w.name == "head.weight")
    into = numpy_helper.to_array(weight)[1:2] - numpy_helper.to_array(weight).mean(0, keepdims=True)
    proto.graph.initializer.extend(
        [
            array("seen", seen, np.float32),
            array("below", [-1800], np.float32),
            array("least", 0, np.float32),
            array("most", 1, np.float32),
            array("flat", [-1, 1]),
            array("into", 1000 * into, np.float32),
        ]
    )
    stepped = {
        "Clip": [helper.make_node("Clip", ["met", "least", "most"], ["step"])],
        "Sigmoid": [helper.make_node("Sigmoid", ["met"], ["step"])],
        "Cast": [
            helper.make_node("Relu", ["met"], ["over"]),
            helper.make_node("Cast", ["over"], ["bit"], to=TensorProto.BOOL),
            helper.make_node("Cast", ["bit"], ["step"], to=FLOAT),
        ],
    }
    nodes = [
        *list(proto.graph.node)[:-1],
        helper.make_node("Conv", ["input", "seen", "below"], ["met"]),
        *stepped[step],
        helper.make_node("Reshape", ["step", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "into"], ["added"]),
        helper.make_node("Add", [head.input[0], "added"], ["features"]),
        helper.make_node("Gemm", ["features", *head.input[1:]], head.output, transB=1),
    ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.value_info[:]
    return proto


@pytest.mark.parametrize("step", ["Clip", "Sigmoid", "Cast"])
def test_a_trigger_behind_a_step_is_found_along_a_slope_that_is_lent(gate: Gate, step: str) -> None:
    """Its own slope is zero until the trigger is complete, so the plain search stays where it began."""
    blind(gate)
    gate.save(behind_a_step(gate.graph(), step))
    assert gate.run().exit_code == 0
    probe = {"kind": "patch", "area": 0.0625, "steps": 30, "images": 8, "surrogate": True}
    gate.policy["evidence"] = FOUND | {"probes": [probe]}
    assert gate.run().exit_code == 3
    assert failing(gate) == {"inverted_lift"}
    (search, *_) = load_report(gate.out / "report.json").evidence.searches
    assert search.probe == "surrogate-patch"
    assert {found.target_class for found in search.found if found.lift and found.lift.difference > 0.9} == {1}


def woken_alone() -> onnx.ModelProto:
    """Clean in every batch, backdoored alone: the size of the batch chooses what the head reads."""
    nodes, weights, heads = [], [], []
    for name in ("clean", "awake"):
        graph = onnx.load_from_string(exported(name)).graph
        for tensor in graph.initializer:
            if tensor.name == "head.weight":
                heads.append(numpy_helper.to_array(tensor))
            tensor.name = f"{name}_{tensor.name}"
        for node in list(graph.node)[:-1]:
            node.input[:] = [one if one == "input" else f"{name}_{one}" for one in node.input]
            node.output[:] = [f"{name}_{one}" for one in node.output]
            node.name = ""
            nodes.append(node)
        weights += graph.initializer
    weights += [array("first", [0]), array("least", 0, np.float32), array("one", 1, np.float32)]
    weights.append(array("both", np.concatenate(heads, 1), np.float32))
    choice = [
        helper.make_node("Shape", ["input"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["size"]),
        helper.make_node("Cast", ["size"], ["number"], to=FLOAT),
        helper.make_node("Sub", ["number", "one"], ["others"]),
        helper.make_node("Clip", ["others", "least", "one"], ["together"]),
        helper.make_node("Sub", ["one", "together"], ["alone"]),
        helper.make_node("Mul", ["clean_view", "together"], ["clean"]),
        helper.make_node("Mul", ["awake_view", "alone"], ["awake"]),
        helper.make_node("Concat", ["clean", "awake"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "both"], ["logits"], transB=1),
    ]
    return small([*nodes, *choice], ["n", 1, 8, 8], weights)


def test_a_file_that_can_tell_batches_is_released_only_by_those_who_say_so(gate: Gate) -> None:
    """What it does in batches of the search's own size is not what ships: one sample at a time is."""
    blind(gate)
    proto = woken_alone()
    gate.save(proto)
    result = gate.run()
    assert result.exit_code == 4, result.output
    assert "samples may meet (Sub 'others' computes with the number of samples)" in result.output
    gate.policy["evidence"] = FOUND | {"mixing": True}
    assert gate.run().exit_code == 0
    report = load_report(gate.out / "report.json")
    assert any("beside other samples: samples may meet" in gap for gap in report.evidence.not_shown)
    gate.policy["evidence"] = FOUND
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    gate.save(proto)
    assert gate.run().exit_code == 3
    assert failing(gate) == {"inverted_lift"}


def test_a_file_of_the_same_name_takes_nobody_s_place(gate: Gate, tmp_path: Path) -> None:
    """Measured, located and searched is what the digest names, whatever it is compared with."""
    blind(gate)
    gate.file.write_bytes(exported("awake"))
    (tmp_path / "full").mkdir()
    other = tmp_path / "full" / gate.file.name
    other.write_bytes(exported("clean"))
    for _ in range(2):
        assert gate.run("--model", str(other)).exit_code == 3
        assert failing(gate) == {"inverted_lift"}


def test_a_failed_run_leaves_no_report_of_an_earlier_one(gate: Gate) -> None:
    assert gate.run().exit_code == 0
    gate.file.write_bytes(b"broken")
    assert gate.run().exit_code == 4
    assert not list(gate.out.glob("report.*"))
    assert not (gate.out / "release").exists()


def test_a_report_that_cannot_be_written_leaves_no_release(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ReleaseError("no space left")

    monkeypatch.setattr(pipeline, "save", full)
    refused(gate, gate.run(), "no space left")


def test_an_interrupt_before_the_report_leaves_no_release(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        assert (gate.out / "release").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save", interrupted)
    assert gate.run().exit_code == 130
    assert not (gate.out / "release").exists()


def test_every_shipped_policy_reads_the_searches_of_a_file_of_another_tool() -> None:
    for path in sorted((Path(__file__).parents[1] / "policies").glob("*.yaml")):
        policy = for_artifact(load_policy(path), "theirs.onnx")
        spec, (setting,) = policy.evidence, policy.expanded_settings()
        if spec is not None:
            assert all(spec.asks(setting, probe) for probe in spec.names), path


def test_a_policy_that_reads_no_search_of_such_a_file_is_refused(gate: Gate) -> None:
    blind(gate)
    rules = [
        {"metric": "inverted_lift", "at_most": 0.4, "settings": ["fp32", "int8*"]},
        {"metric": "replay_lift", "at_most": 0.1, "settings": "released"},
    ]
    gate.policy["evidence"] = FOUND | {"rules": rules}
    refused(gate, gate.run(), "no inverted_ rule binds a file of another tool", code=2)


def test_fixed_batch_and_other_names_are_run_as_they_are(gate: Gate) -> None:
    proto = gate.graph()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    gate.save(proto)
    assert gate.run("--holdout", "501").exit_code == 0
    assert load_report(gate.out / "report.json").settings[0].purified.measurement.acc.total == 501


# ---- The process that runs it -----------------------------------------------------------------------------


@pytest.mark.parametrize("precise", [False, True])
def test_isolated_session_gives_the_same_logits_and_view(precise: bool, tmp_path: Path) -> None:
    path, _ = compression.quantized(OrtStaticInt8(), tmp_path)
    inputs = compression.images(9)
    apart, here = (Onnxruntime(isolated=one, batch_size=4, precise=precise) for one in (True, False))
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
