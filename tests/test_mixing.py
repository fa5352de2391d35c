"""Samples of one batch that cannot meet are told from those that may, for every size of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from benchmarks import networks
from secure_export import twins
from secure_export.formats.onnx import Onnx
from secure_export.twins.mixing import mixing, mixing_of
from tests import compression
from tests.gating import FLOAT, array, small

SHAPE = (3, 8, 8)
Body = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A linear head behind whatever is tried."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(192, 4)
        self.token = nn.Parameter(torch.rand(1, 1, 64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(self, inputs)


def twin_of(body: Body, folder: Path) -> twins.Twin:
    path = folder / "net.onnx"
    Onnx().write(Net(body).eval(), torch.rand(3, *SHAPE), path)
    return twins.of_onnx(path)


def attended(net: nn.Module, x: Tensor) -> Tensor:
    """Channels as tokens, one more in front, as a transformer has it."""
    tokens = torch.cat([net.token.expand(x.shape[0], -1, -1), x.flatten(2)], 1)
    seen = torch.softmax(tokens @ tokens.transpose(1, 2) / 8, -1) @ tokens
    return net.head(seen[:, 1:].reshape(x.shape[0], -1))


APART: dict[str, Body] = {
    "view by size": lambda net, x: net.head(x.view(x.size(0), -1)),
    "view by rest": lambda net, x: net.head(x.reshape(-1, 192)),
    "attention": attended,
    "mean": lambda net, x: net.head((x - x.mean((1, 2, 3), keepdim=True)).flatten(1)),
}
MIXED: dict[str, Body] = {
    "mean": lambda net, x: net.head(x.flatten(1) - x.flatten(1).mean(0, keepdim=True)),
    "size": lambda net, x: net.head(x.flatten(1)) * x.shape[0],
    "rows of others": lambda net, x: net.head(x.reshape(2, -1, 96).transpose(0, 1).reshape(-1, 192)),
    "products": lambda net, x: net.head(x.flatten(1)) + (x.flatten(1) @ x.flatten(1).T).mean(1, keepdim=True),
    "softmax": lambda net, x: net.head(x.flatten(1)).softmax(0),
    "first of all": lambda net, x: net.head(x.flatten(1)) + net.head(x[:1].flatten(1)),
}


@pytest.mark.parametrize("name", APART)
def test_what_works_on_rows_alone_is_told(name: str, tmp_path: Path) -> None:
    twin = twin_of(APART[name], tmp_path)
    assert mixing(twin, SHAPE) == ""
    inputs = torch.rand(5, *SHAPE)
    alone = torch.cat([twin(one[None]) for one in inputs])
    assert torch.allclose(twin(inputs), alone, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_what_reads_other_samples_or_their_number_is_told(name: str, tmp_path: Path) -> None:
    assert mixing(twin_of(MIXED[name], tmp_path), SHAPE)


@pytest.mark.parametrize("name", ["cnn", "resnet18_w8"])
def test_networks_of_the_trade_keep_samples_apart(name: str, tmp_path: Path) -> None:
    """Channels last in memory too, of which torch exports a pooling as an index over the batch."""
    path, shape = tmp_path / "net.onnx", (3, 32, 32)
    Onnx().write(networks.named(name).eval(), torch.rand(2, *shape), path)
    assert mixing(twins.of_onnx(path), shape) == ""


@pytest.mark.parametrize(("kind", "apart"), [("ort-static-int8", True), ("ort-dynamic-int8", False)])
def test_scales_that_a_batch_shares(kind: str, apart: bool, tmp_path: Path) -> None:
    found = mixing(twins.of_onnx(compression.written(kind, tmp_path)), compression.images(1).shape[1:])
    assert (found == "") is apart
    assert apart or "takes its scale from the whole batch" in found


@pytest.mark.parametrize(
    ("sizes", "apart"), [((4,), True), ((1, 4), True), ((2, 4), False), ((1, 1, 4), False)]
)
def test_a_weight_that_differs_by_place_in_the_batch(sizes: tuple[int, ...], apart: bool) -> None:
    """torch would write none of those that do."""
    weight = [array("more", np.zeros(sizes), np.float32)]
    proto = small([helper.make_node("Add", ["input", "more"], ["logits"])], ["n", 4], weight)
    assert (mixing(twins.Twin(proto, "crafted"), (4,)) == "") is apart


@pytest.mark.parametrize(("batch", "apart"), [("n", False), (8, False), (1, True)])
def test_a_batch_of_one_has_nothing_to_mix(batch: str | int, apart: bool, tmp_path: Path) -> None:
    """What has no twin is not known otherwise."""
    path = tmp_path / "crafted.onnx"
    for operator in ("Sign", "Softmax"):
        proto = small([helper.make_node(operator, ["input"], ["logits"], axis=0)], [batch, 4])
        path.write_bytes(proto.SerializeToString())
        assert (mixing_of(path, "onnx", (4,)) == "") is apart


def test_a_size_of_no_axes_is_no_traceback() -> None:
    """ONNX allows it, and it changes nothing."""
    proto = small([helper.make_node("Expand", ["input", "none"], ["logits"])], ["n", 4], [array("none", [])])
    assert "Expand" in mixing(twins.Twin(proto, "crafted"), (4,))


def test_an_output_without_a_twin_is_no_traceback() -> None:
    """ONNX Runtime gives the places of maxima too; a twin has no such output, and says so."""
    proto = small(
        [
            helper.make_node("MaxPool", ["input"], ["most", "places"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Cast", ["places"], ["numbers"], to=FLOAT),
            helper.make_node("Flatten", ["numbers"], ["logits"]),
        ],
        ["n", 1, 4, 4],
    )
    with pytest.raises(twins.CompressError, match="no differentiable twin of crafted: Cast"):
        twins.Twin(proto, "crafted")(torch.rand(2, 1, 4, 4))
