"""A small residual network and its calibration split, for the tests of compressors, formats and runtimes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from secure_export import registry
from secure_export.compressors import Context, FileStep
from secure_export.compressors._layers import recalibrate_batchnorm
from secure_export.errors import PolicyError
from secure_export.formats import Format
from secure_export.formats.onnx import Onnx
from secure_export.purifiers.fine_tune import FineTune
from secure_export.records.measured import Change
from secure_export.records.memory import Split
from secure_export.runtimes import Runtime

P = TypeVar("P", bound=registry.Plugin)
HEAD, CLASSES, SHAPE = "head", 4, (3, 12, 12)
WEIGHTS_ALONE = ("safetensors",)
"""Formats without a graph: their files run in the user's own architecture, here `network`."""


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(inputs)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


class Residual(nn.Module):
    """Normalization inside, as loaded models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 16, 2), nn.Dropout(0.5), Block(16, 16, 2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.blocks(torch.relu(self.norm(self.stem((inputs - self.mean) / 0.25))))
        return self.head(hidden.mean((2, 3)))


def built(base: type[P], family: str, kind: str, **options: Any) -> P:
    """The plug-in, or a skipped test where its extra is not installed."""
    try:
        return registry.build(base, family, {"kind": kind, **options})
    except PolicyError as error:
        if "is not installed" not in error.message:
            raise
        pytest.skip(f"{error.message}: {error.hint}")


def running(name: str, **options: Any) -> Runtime:
    """The runtime `name` for files of `network()`, with those of `options` that it has."""
    known = registry.load("runtimes", name).model_fields
    given = {"architecture": f"{__name__}:network", "input_shape": SHAPE, **options}
    return built(Runtime, "runtimes", name, **{key: value for key, value in given.items() if key in known})


def network(seed: int = 0) -> Residual:
    """Untrained, but with BatchNorm statistics of `calibration`, so that its logits spread."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Residual()
    with torch.no_grad():
        model.head.weight.mul_(8)
    recalibrate_batchnorm(model, calibration(256))
    return model.eval()


def images(n: int, seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Smooth random images [n, ...] in [0, 1]: noise at a quarter of the resolution, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, shape[0], shape[1] // 4, shape[2] // 4, generator=generator)
    return nn.functional.interpolate(coarse, shape[1:], mode="bilinear")


def calibration(n: int = 64, shape: tuple[int, ...] = SHAPE) -> Split:
    """As data arrives: uint8."""
    inputs = images(n, shape=shape).mul(255).round().to(torch.uint8)
    return Split(inputs, torch.arange(n) % CLASSES, sha256="calibration")


def context(teacher: nn.Module, head: str = HEAD, seed: int = 0, n: int = 64) -> Context:
    """A context around `teacher`, whose inputs have SHAPE; what is purified again learns a second's worth."""
    split = calibration(n)

    def purify(model: nn.Module) -> nn.Module:
        return FineTune(epochs=1).purify(model, head, 1, split, seed=seed).model

    return Context(head=head, calibration=split, teacher=teacher, seed=seed, purify=purify)


@functools.cache
def exported() -> bytes:
    """`network()` as ONNX; exporting takes longer than anything else here."""
    with tempfile.TemporaryDirectory() as folder:
        Onnx().write(network(), images(4), Path(folder, "model.onnx"))
        return Path(folder, "model.onnx").read_bytes()


def quantized(step: FileStep, folder: Path) -> tuple[Path, Change]:
    """(path of the compressed file, change) of `network()` through ONNX and `step`."""
    form = built(Format, "formats", step.works_on)
    source, target = folder / f"model{form.suffix}", folder / f"model.int8{form.suffix}"
    if step.works_on == "onnx":
        source.write_bytes(exported())
    else:
        form.write(network(), images(4), source)
    return target, step.on_file(source, target, context(network()))


def written(kind: str, folder: Path) -> Path:
    """`network()` as an ONNX file, through the file step `kind`; as it is where that is empty."""
    if not kind:
        path = folder / "model.onnx"
        path.write_bytes(exported())
        return path
    step = registry.build(FileStep, "compressors", {"kind": kind})
    return quantized(step, folder)[0]
