"""What a deployer may do to a zoo model, each as a function from images in [0, 1] to logits.

The steps are the package's own plug-ins, so a card and a report speak of the same files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.datasets import Images, to_unit
from benchmarks.networks import Normalized
from secure_export import digests, heads
from secure_export.compressors import Context, FileStep, ModuleStep
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.compressors.prune_channel_mask import PruneChannelMask
from secure_export.compressors.prune_structured import PruneStructured
from secure_export.formats.onnx import Onnx
from secure_export.records.memory import Split
from secure_export.runtimes.onnxruntime import Onnxruntime

Forward = Callable[[Tensor], Tensor]

FP32 = "fp32"
INT8 = {
    "int8-s8s8": OrtStaticInt8(activation_type="int8"),
    "int8-u8s8": OrtStaticInt8(),
    "int8-per-tensor": OrtStaticInt8(per_channel=False),
    "int8-unsigned": OrtStaticInt8(weight_type="uint8"),
}
PRUNED: dict[str, ModuleStep] = {
    **{f"mask-{r}": PruneChannelMask(ratio=r, recalibrate=False) for r in (0.3, 0.5, 0.7, 0.9)},
    **{f"mask-recalibrated-{r}": PruneChannelMask(ratio=r) for r in (0.3, 0.5, 0.7)},
    **{f"structured-{r}": PruneStructured(ratio=r) for r in (0.3, 0.5, 0.7)},
    **{f"structured-own-{r}": PruneStructured(ratio=r, importance="own-l1") for r in (0.3, 0.5, 0.7)},
}
NAMES = (FP32, *INT8, *PRUNED)


def forward(network: nn.Module, setting: str, data: Images, samples: int = 500) -> Forward:
    """`network` (normalized inputs) under `setting`; the calibration split is the first training images."""
    model = (
        Normalized(copy.deepcopy(network), data.train_x.shape[1])
        .eval()
        .to(memory_format=torch.contiguous_format)
    )
    head, _ = heads.find(model, tuple(data.train_x.shape[1:]))
    context = Context(head, _split(data, samples), model, seed=0)
    if setting in INT8:
        return _written(model, INT8[setting], context)
    if setting in PRUNED:
        model, _ = PRUNED[setting].on_module(model, context)  # type: ignore[assignment]
    return model.to(memory_format=torch.channels_last)


def _written(model: nn.Module, step: FileStep, context: Context) -> Forward:
    """The int8 file's own bytes in ONNX Runtime: nothing else says whether a backdoor wakes in it."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        Onnx().write(model, context.calibration.floats(slice(0, 4)), source)
        step.on_file(source, target, context)
        return Onnxruntime().open(target)


def _split(data: Images, samples: int) -> Split:
    x, y = data.train_x[:samples], data.train_y[:samples]
    return Split(x, y, digests.of_arrays(to_unit(x[:1]).numpy(), y.numpy()))
