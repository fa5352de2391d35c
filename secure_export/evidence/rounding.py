"""Traces of a quantization-conditioned backdoor in the rounding of a file's weights: no trigger, no gradient.

Such a backdoor decides on which side of a rounding threshold every weight lies. Ordinary training knows of no
thresholds, so the residues W/s - Q are uniform, spectrally noise, and their sum pushes the logits nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from secure_export import twins
from secure_export.counting import judged_on
from secure_export.errors import CompressError
from secure_export.records.measured import Lane
from secure_export.records.memory import Split
from secure_export.records.searches import Rounding
from secure_export.words import printable

if TYPE_CHECKING:
    from onnx import ModelProto

DRAWS = 19
"""Random sign patterns: the smallest p is 1/20."""
FEWEST = 200
"""Residues of a layer; with fewer, neither distribution nor spectrum says anything."""
NAMED = 0.5
"""Share of samples that the extrapolation has to carry into one class to name it."""


@dataclass(frozen=True)
class Rounded:
    """One layer: weights as they were, their step (broadcastable), and as the file has them."""

    name: str
    weight: Tensor
    step: Tensor
    rounded: Tensor


def reading(lane: Lane, setting: str, source: Path, file: Path, fit: Split, *, seed: int) -> Rounding:
    """What the rounding between the float file `source` and the quantized `file` shows, by `fit` samples.

    Kolmogorov-Smirnov and spectrum look at W alone; effect and extrapolation at what the file makes of it.

    Raises:
        CompressError: one of the files cannot be read, or the weights of the two do not belong together.
    """
    started = time.perf_counter()
    layers = rounded_layers(onnx.load(source), onnx.load(file), file.name)
    if not layers:
        return Rounding(lane, setting)
    residues = [residues_of(layer) for layer in layers]
    large = [residue for residue in residues if len(residue[residue.isfinite()]) >= FEWEST]
    twin = twins.of_onnx(source)
    generator = torch.Generator().manual_seed(seed)
    inputs = judged_on(fit, generator).floats()
    z, p = effect(twin, inputs, layers, generator)
    shares, target_class = extrapolated(twin, inputs, layers)
    return Rounding(
        lane=lane,
        setting=setting,
        layers=len(layers),
        ks=max((distance_to_uniform(residue) for residue in large), default=None),
        edge=max((over_the_edge(residue) for residue in large), default=None),
        z=z,
        p=p,
        draws=DRAWS,
        top_shares=shares,
        target_class=target_class,
        seconds=round(time.perf_counter() - started, 3),
    )


def rounded_layers(source: ModelProto, quantized: ModelProto, file: str) -> list[Rounded]:
    """Weights that are integers in `quantized` and floats of the same name in `source`.

    Raises:
        CompressError: integer weights that `source` does not know, or further away than a step.
    """
    floats = {t.name: t for t in source.graph.initializer if t.data_type == TensorProto.FLOAT}
    known = {t.name: t for t in quantized.graph.initializer}
    axes = {
        node.input[0]: next((a.i for a in node.attribute if a.name == "axis"), 1)
        for node in quantized.graph.node
        if node.op_type == "DequantizeLinear"
    }
    integers = [
        t
        for t in quantized.graph.initializer
        if t.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(t.dims) >= 2
    ]
    found = []
    for tensor in integers:
        name = tensor.name.removesuffix("_quantized")
        if name not in floats or f"{name}_scale" not in known:
            raise CompressError(f"{file}: {printable(tensor.name)} has no counterpart before rounding")
        weight, codes = _tensor(floats[name]), _tensor(tensor).float()
        if weight.shape != codes.shape:
            weight = weight.T
        step, zero = _tensor(known[f"{name}_scale"]), _tensor(known[f"{name}_zero_point"]).float()
        if step.numel() > 1:
            shape = [1] * codes.ndim
            shape[axes.get(tensor.name, 0)] = -1
            step, zero = step.reshape(shape), zero.reshape(shape)
        rounded = (codes - zero) * step
        if weight.shape != codes.shape or float(((rounded - weight).abs() / step).max()) > 1.01:
            raise CompressError(f"{file}: {name} is no rounding of the weights before it")
        if weight.shape != tuple(floats[name].dims):
            weight, rounded, step = weight.T, rounded.T, step.T if step.ndim == 2 else step
        found.append(Rounded(name, weight, step, rounded))
    return found


def _tensor(proto: TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(proto).copy())


def residues_of(layer: Rounded) -> Tensor:
    """W/s - round(W/s) as [channels, rest]; NaN for zeros and for the weights that define the step."""
    scaled = layer.weight / layer.step
    residue = scaled - scaled.round()
    defines = scaled.abs() >= scaled.abs().flatten(1).amax(1).view(-1, *[1] * (scaled.ndim - 1)) * (1 - 1e-6)
    return residue.masked_fill((layer.weight == 0) | defines, float("nan")).flatten(1)


def distance_to_uniform(residue: Tensor) -> float:
    """sqrt(n) sup |F_n - F| against the uniform law on [-.5, .5] (Kolmogorov-Smirnov)."""
    values = residue[residue.isfinite()].double().sort().values + 0.5
    n = len(values)
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = torch.maximum(ranks - values, values - ranks + 1 / n).max()
    return float(distance * n**0.5)


def over_the_edge(residue: Tensor) -> float:
    """Top singular value in units of sigma (sqrt(m) + sqrt(n)), the edge for independent uniform entries.

    Marchenko and Pastur (1967); sigma^2 = 1/12.
    """
    matrix = residue.nan_to_num(0.0)
    rows, columns = matrix.shape
    edge = (rows**0.5 + columns**0.5) / 12**0.5
    return float(torch.linalg.svdvals(matrix)[0] / edge)


@torch.no_grad()
def effect(
    twin: twins.Twin, inputs: Tensor, layers: Sequence[Rounded], generator: torch.Generator
) -> tuple[float, float]:
    """(z, exact p) of how far the rounding moves the mean logits, against random signs of the same errors.

    Were the signs of the errors independent of the function, all sign patterns would be exchangeable, so the
    rank of the file's own among DRAWS random ones is exact (a randomization test).
    """
    before = twin(inputs).mean(0)

    def moved(signs: Sequence[Tensor] | None) -> float:
        weights = {}
        for i, layer in enumerate(layers):
            error = layer.rounded - layer.weight
            weights[layer.name] = layer.weight + (error if signs is None else error * signs[i])
        change = twin(inputs, weights).mean(0) - before
        return float((change - change.mean()).norm())

    own = moved(None)
    drawn = torch.tensor(
        [
            moved(
                [torch.randint(0, 2, layer.weight.shape, generator=generator) * 2.0 - 1 for layer in layers]
            )
            for _ in range(DRAWS)
        ]
    )
    p = (1 + int((drawn >= own).sum())) / (DRAWS + 1)
    return float((own - drawn.mean()) / drawn.std().clamp(min=1e-12)), p


@torch.no_grad()
def extrapolated(
    twin: twins.Twin, inputs: Tensor, layers: Sequence[Rounded]
) -> tuple[tuple[float, ...], int | None]:
    """Share of the most predicted class under W + t (Q(W) - W), t = 1..4, and the class that it ends in."""
    shares, top = [], -1
    for t in (1, 2, 3, 4):
        weights = {layer.name: layer.weight + t * (layer.rounded - layer.weight) for layer in layers}
        counts = twin(inputs, weights).argmax(1).bincount()
        top = int(counts.argmax())
        shares.append(float(counts[top]) / len(inputs))
    grows = shares[-1] >= NAMED and shares[-1] > 1.5 * shares[0]
    return tuple(shares), top if grows else None
