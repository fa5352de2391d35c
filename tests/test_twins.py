"""A twin computes what its file computes, and gives gradients; what it cannot read it says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from torch import nn

from benchmarks import networks
from secure_export import registry, twins
from secure_export.compressors import Context, FileStep
from secure_export.errors import CompressError
from secure_export.formats import onnx as formats_onnx
from secure_export.formats.onnx import Onnx
from secure_export.records.memory import Split
from secure_export.runtimes.onnxruntime import Onnxruntime
from secure_export.twins._operators import OPERATORS, rounded
from tests import compression


@pytest.mark.parametrize("kind", ["", "ort-static-int8", "ort-dynamic-int8"])
def test_twin_agrees_with_its_file(kind: str, tmp_path: Path) -> None:
    path = compression.written(kind, tmp_path)
    inputs = compression.images(32)
    # Integer products are made exact by an optimization; the others would only move the logits.
    optimization: Literal["all", "disabled"] = "all" if kind == "ort-dynamic-int8" else "disabled"
    expected = Onnxruntime(optimization=optimization, precise=True).open(path)(inputs)
    twin = twins.of_onnx(path)
    probed = inputs.clone().requires_grad_(True)
    logits = twin(probed)
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), probed)
    assert gradient.abs().sum() > 0


class Signal(nn.Module):
    """A 1-D network with pooling, uneven padding and normalization over features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 6, 4, 2), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.hardswish(self.conv(nn.functional.pad(inputs, (1, 2))))
        hidden = nn.functional.max_pool1d(hidden, 2).mean(2)
        return self.head(nn.functional.gelu(self.norm(hidden)))


def test_twin_of_a_signal_network(tmp_path: Path) -> None:
    path, inputs = tmp_path / "signal.onnx", torch.rand(4, 2, 40)
    model = Signal().eval()
    Onnx().write(model, inputs, path)
    assert torch.allclose(twins.of_onnx(path)(inputs), model(inputs), atol=1e-5)


@pytest.mark.parametrize("kind", ["", "ort-static-int8"])
def test_twin_of_a_network_that_pools_to_one_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As others export a network whose weights lie channels last: with Shape, Range and Gather."""
    monkeypatch.setattr(formats_onnx, "contiguous", lambda model: model)
    model, inputs = nn.Sequential(networks.named("cnn"), nn.Identity()).eval(), torch.rand(8, 3, 8, 8)
    path, target = tmp_path / "cnn.onnx", tmp_path / "int8.onnx"
    Onnx().write(model, inputs, path)
    assert "Shape" in {node.op_type for node in onnx.load(path).graph.node}
    if kind:
        step = registry.build(FileStep, "compressors", {"kind": kind})
        step.on_file(path, target, Context("0.fc", Split(inputs, torch.zeros(8).long(), ""), model, 0))
        path = target
    expected = Onnxruntime(optimization="disabled").open(path)(inputs)
    assert (twins.of_onnx(path)(inputs) - expected).abs().max() < 0.02 * expected.abs().max()


def test_operator_without_a_twin_is_named(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Einsum", ["input"], ["logits"], equation="ij->i")
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("input", floats, [None, 3])],
        [onnx.helper.make_tensor_value_info("logits", floats, [None])],
    )
    path = tmp_path / "einsum.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(CompressError, match="Einsum"):
        twins.of_onnx(path)


@pytest.mark.parametrize(("kind", "zero"), [(torch.uint8, 120), (torch.int8, -3)])
def test_rounding_at_once_is_quantizing_and_dequantizing(kind: torch.dtype, zero: int) -> None:
    data = (3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    grid = [torch.tensor(0.02), torch.tensor(zero, dtype=kind)]
    codes = OPERATORS["QuantizeLinear"]([data, *grid], {})
    apart = OPERATORS["DequantizeLinear"]([codes, *grid], {})
    at_once = rounded([data, *grid], {})
    torch.testing.assert_close(at_once, apart)
    weight = torch.arange(20.0).view(4, 5)
    torch.testing.assert_close(
        *(torch.autograd.grad((made * weight).sum(), data)[0] for made in (at_once, apart))
    )
    assert (at_once - data).abs().max() > 1, "some values must be beyond the grid, or nothing is cut off"
