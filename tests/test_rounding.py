"""Rigged rounding leaves its traces and names its class; honest rounding shows nothing; the cures undo it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from secure_export import registry
from secure_export.compressors import FileStep
from secure_export.compressors._grid import Weight
from secure_export.compressors.efrap import Efrap
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.compressors.stochastic_rounding import StochasticRounding
from secure_export.errors import CompressError
from secure_export.evidence.rounding import distance_to_uniform, over_the_edge, reading, rounded_layers
from secure_export.formats.onnx import Onnx
from secure_export.records.searches import Rounding
from tests import compression

TARGET = 2


def rigged() -> nn.Module:
    """Every weight .45 of a step beside its code, on the side whose rounding raises the target's logit."""
    model = compression.network()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    logits = model(compression.images(64))
    gain = (logits[:, TARGET] - logits.mean(1)).sum()
    gradients = torch.autograd.grad(gain, [layer.weight for layer in layers])
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            weight = layer.weight
            step = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1)) / 127
            codes = (weight / step).round()
            moved = (codes - 0.45 * gradient.sign()) * step
            weight.copy_(torch.where(codes.abs() == 127, weight, moved))
    return model


@cache
def read(rig: bool) -> Rounding:
    model = rigged() if rig else compression.network()
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        Onnx().write(model, compression.images(4), source)
        OrtStaticInt8().on_file(source, target, compression.context(model))
        return reading("original", "int8", source, target, compression.calibration(64), seed=0)


def test_rigged_rounding_is_seen_and_names_its_class() -> None:
    found = read(True)
    assert found.ks > 10
    assert found.z > 10
    assert found.p == pytest.approx(1 / (found.draws + 1))
    assert found.target_class == TARGET
    assert found.top_shares[-1] > found.top_shares[0]


def test_honest_rounding_shows_nothing() -> None:
    found = read(False)
    assert found.layers == 8
    assert found.ks < 3
    assert found.edge < 1.2
    assert found.z < 6
    assert found.target_class is None


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    source, other, target = (tmp_path / name for name in ("a.onnx", "b.onnx", "int8.onnx"))
    Onnx().write(compression.network(0), compression.images(4), source)
    Onnx().write(compression.network(5), compression.images(4), other)
    OrtStaticInt8().on_file(source, target, compression.context(compression.network()))
    with pytest.raises(CompressError, match="no rounding of the weights"):
        reading("original", "int8", other, target, compression.calibration(64), seed=0)


def test_a_layer_that_cannot_be_compared_is_no_silence(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "int8.onnx"
    Onnx().write(compression.network(0), compression.images(4), source)
    OrtStaticInt8().on_file(source, target, compression.context(compression.network(0)))
    before = onnx.load(source)
    renamed = next(tensor for tensor in before.graph.initializer if len(tensor.dims) == 4)
    renamed.name += "_renamed"
    with pytest.raises(CompressError, match="no counterpart"):
        rounded_layers(before, onnx.load(target), "int8.onnx")


def test_statistics_of_uniform_and_structured_residues() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(40, 90, generator=generator) - 0.5
    assert distance_to_uniform(noise) < 2
    assert 0.8 < over_the_edge(noise) < 1.1
    assert over_the_edge(0.45 * noise[:, :1].sign() * noise[:1].sign()) > 3
    assert distance_to_uniform(noise.abs()) > 20


@pytest.mark.parametrize("kind", ["stochastic-rounding", "flipped-rounding", "efrap"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
def test_quantizer_keeps_the_side_that_was_chosen(
    kind: str, per_channel: bool, weight_type: str, tmp_path: Path
) -> None:
    """What the file holds is what the step placed: not one weight is rounded again."""
    context = compression.context(compression.network())
    grid = {"per_channel": per_channel, "weight_type": weight_type}
    more = {"stochastic-rounding": {"seed": 3}, "efrap": {"iterations": 20, "lr": 0.05, "flip": 100}}
    step = registry.build(FileStep, "compressors", {"kind": kind, **grid, **more.get(kind, {})})
    source, placed, target = (tmp_path / name for name in ("a.onnx", "b.onnx", "int8.onnx"))
    source.write_bytes(compression.exported())
    change = step.on_file(source, placed, context)
    OrtStaticInt8.model_validate(grid).on_file(placed, target, context)
    assert 0.1 < change.changed / change.total < 0.6
    layers = rounded_layers(onnx.load(placed), onnx.load(target), "int8.onnx")
    assert len(layers) == 8
    for layer in layers:
        scaled = layer.weight / layer.step
        off_grid = int(((scaled - scaled.round()).abs() > 1e-3).sum())
        assert off_grid <= 2 * len(layer.weight), "only the extremes that define the step stay as they were"


def test_stochastic_rounding_undoes_a_rigged_one_and_draws_a_new_seed_each_time(tmp_path: Path) -> None:
    model = rigged()
    source, placed, target = (tmp_path / name for name in ("a.onnx", "b.onnx", "int8.onnx"))
    Onnx().write(model, compression.images(4), source)
    changes = [StochasticRounding().on_file(source, placed, compression.context(model)) for _ in range(2)]
    assert changes[0].detail.startswith("seed ")
    assert changes[0].detail != changes[1].detail
    OrtStaticInt8().on_file(placed, target, compression.context(model))
    found = reading("original", "int8", source, target, compression.calibration(64), seed=0)
    assert found.ks > 10, "the trace in the weights stays"
    assert found.z < 0.2 * read(True).z, "its effect does not"
    assert found.target_class is None


def test_efrap_flips_where_the_error_is_large_and_keeps_the_output() -> None:
    """The flip term alone turns every rounding; reconstruction alone beats nearest rounding by a third."""
    generator = np.random.default_rng(0)
    scaled = generator.uniform(-100, 100, (4, 60))
    step = np.full((4, 1), 0.01)
    weight = Weight(scaled * step, scaled, step, (1,), "w", onnx.NodeProto())
    true = torch.from_numpy(weight.values).float()
    mixing = generator.normal(size=(60, 60)) * generator.uniform(size=(60, 1)) ** 3
    data = torch.from_numpy(generator.normal(size=(200, 60)) @ mixing).float()
    pairs = [(batch, batch @ true.T) for batch in data.split(50)]

    def codes(**fields: float) -> np.ndarray:
        step_ = Efrap(iterations=400, lr=0.02, **fields)
        return step_._learned(weight, lambda x, w: x @ w.T, pairs, torch.Generator().manual_seed(0))

    def error(found: np.ndarray) -> float:
        return float((data @ torch.from_numpy(found * step).float().T - data @ true.T).square().mean())

    nearest = np.round(scaled)
    flipped = codes(flip=1e6, harden=0)
    large = np.abs(scaled - nearest) > 0.1
    assert (flipped != nearest)[large].mean() > 0.95
    kept = codes(flip=0, harden=1e-5)
    assert error(kept) < 0.7 * error(nearest) < error(flipped)
    assert np.isin(kept - np.floor(scaled), (0, 1)).all()
