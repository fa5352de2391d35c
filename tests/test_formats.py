"""Every format: the file opens in its runtime, agrees with eager, and its bytes depend on the model alone."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from secure_export import digests, registry
from secure_export.compressors.torchao_int8_dynamic import TorchaoInt8Dynamic
from secure_export.compressors.torchao_pt2e_static_int8 import TorchaoPt2eStaticInt8
from secure_export.errors import CompressError
from secure_export.formats import Format
from secure_export.formats import onnx as form
from secure_export.formats.onnx import Onnx
from tests import compression
from tests.compression import built, images, network, running

NAMES = registry.names("formats")


def default(name: str) -> Format:
    return built(Format, "formats", name)


@pytest.mark.parametrize("name", NAMES)
def test_file_opens_in_its_runtime_and_agrees_with_eager(name, tmp_path, capfd):
    form, model = default(name), network()
    path = tmp_path / f"model{form.suffix}"
    before = digests.of_state(model.state_dict())
    form.write(model, images(1), path)
    predict = running(form.runtime).open(path)
    for n in (1, 2, 7):
        assert torch.allclose(predict(images(n)), model(images(n)), atol=1e-4)
    assert predict(images(0)).shape == (0, compression.CLASSES)
    assert digests.of_state(model.state_dict()) == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_from_two_directories(name, tmp_path):
    """Build paths get into stack traces, so the network's source itself lies in two places."""
    form, found = default(name), set()
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        source = shutil.copy(Path(compression.__file__), folder / "copied_network.py")
        spec = importlib.util.spec_from_file_location("copied_network", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        path = folder / f"{folder.name}{form.suffix}"
        form.write(module.network(), images(3), path)
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert b"copied_network" not in content
        found.add(digests.of_file(path))
    assert len(found) == 1


@pytest.mark.parametrize("name", NAMES)
def test_example_does_not_travel(name, tmp_path):
    form, model = default(name), network()
    paths = [tmp_path / f"{n}{form.suffix}" for n in (2, 5)]
    for n, path in zip((2, 5), paths, strict=True):
        form.write(model, images(n, seed=n), path)
    assert digests.of_file(paths[0]) == digests.of_file(paths[1])


class Branching(compression.Residual):
    """Its path depends on the data."""

    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


class OneSize(compression.Residual):
    """Its batch is fixed."""

    def forward(self, inputs):
        return super().forward(inputs.reshape(2, *compression.SHAPE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [Branching, OneSize])
def test_untraceable_model_is_refused(name, model, tmp_path, capfd):
    path, form = tmp_path / "model", default(name)
    if name in compression.WEIGHTS_ALONE:
        pytest.skip("it holds weights alone")
    with pytest.raises(CompressError, match="cannot export") as caught:
        form.write(model().eval(), images(2), path)
    assert "\n" not in str(caught.value)
    assert not path.exists()
    assert capfd.readouterr().out == ""


class Noisy(compression.Residual):
    """Exported or not, it never says the same twice."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return logits + torch.rand_like(logits)


def test_onnx_that_disagrees_with_eager_is_refused(tmp_path):
    with pytest.raises(CompressError, match="disagrees with eager"):
        Onnx().write(Noisy().eval(), images(4), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_with_nan_logits_is_refused(tmp_path):
    model = network()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(CompressError, match="disagrees with eager"):
        Onnx().write(model, images(4), tmp_path / "model.onnx")


def test_operator_that_onnx_lacks_is_named(tmp_path):
    step = TorchaoInt8Dynamic()
    model, _ = step.on_module(network(), compression.context(network()))
    with pytest.raises(CompressError, match=r"ONNX: operator aten\._int_mm\.default cannot be translated$"):
        Onnx().write(model, images(2), tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def rounding():
    """A PT2E graph, whose activations are rounded: eager as ONNX would have it."""
    return TorchaoPt2eStaticInt8().on_module(network(), compression.context(network()))[0]


def test_rounding_graph_may_differ_as_eager_does_from_itself(rounding, tmp_path):
    path = tmp_path / "model.onnx"
    Onnx().write(rounding, images(2), path)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("factor", [0.97, 1.03, float("nan")])
def test_wrong_scale_in_a_rounding_graph_is_refused(factor, rounding, tmp_path):
    proto = form.exported(rounding, images(2))
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    node = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights)
    scale = weights[node.input[1]]
    scale.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(factor), scale.name)
    )
    with pytest.raises(CompressError, match="disagrees with eager"):
        form.check_agreement(rounding, proto.SerializeToString(), images(2), 1e-3, rounds=True)


def test_last_bits_of_every_scale_are_no_disagreement(rounding):
    """As another toolchain adds up in another order; the first rounding hides what only the inputs do."""
    proto = form.exported(rounding, images(2))
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(values * np.float32(1 + form.LAST_BITS), tensor.name)
            )
    form.check_agreement(rounding, proto.SerializeToString(), images(2), 1e-3, rounds=True)


def test_onnx_names_and_contents(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(compression.exported())
    model = onnx.load(path)
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("input", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node), (
        "folded, as int8 needs it"
    )
