"""LiteRT's interpreter with XNNPACK: the .tflite file, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from secure_export.errors import CompressError
from secure_export.litert_files import interpreter
from secure_export.quiet import silent_stderr
from secure_export.records.memory import Predictor, View
from secure_export.runtimes import Runtime
from secure_export.runtimes._checks import check_head, read
from secure_export.runtimes._cpu import cpu
from secure_export.words import first_line

PASSED = ("RESHAPE", "TRANSPOSE", "DEQUANTIZE", "QUANTIZE", "MEAN", "SUM")
"""What may stand between the head and the logits; a sum over more than one place does not pass the check."""
HEADS = ("FULLY_CONNECTED", "CONV_2D")
EXACT = 0.05
"""How far the head may be off, as a share of the largest logit: integers step by 1/255 of their range."""
OTHER_KERNELS = 0.2
"""The same beside XNNPACK: keeping every value takes other kernels, which round otherwise in every layer."""


class Litert(Runtime):
    """One sample at a time, as devices run it."""

    libraries: ClassVar[tuple[str, ...]] = ("ai_edge_litert",)
    extra: ClassVar[str] = "litert"

    threads: int = Field(1, ge=1, description="threads of one inference")

    def open(self, path: Path) -> Predictor:
        """The file as a function of raw inputs [N, ...] float32 in [0, 1]; logits [N, classes] float32.

        Raises:
            CompressError: no such file, or LiteRT cannot run it.
        """
        made = interpreter(read(path), path.name, threads=self.threads)
        return _reading(made, made.get_output_details()[0]["index"], path.name)

    def view(self, path: Path, setting: str) -> View:
        """Last hidden layer [N, D], weight [K, D] and bias [K], dequantized, from the graph in the file.

        Raises:
            CompressError: the logits come from no matrix product or 1x1 convolution with the file's weights.
        """
        content = read(path)
        made = interpreter(content, path.name, threads=self.threads, every_value=True)
        data, weight, bias, given = _head(made, path.name)
        output = made.get_output_details()[0]["index"]
        hidden = _reading(made, data, path.name)

        def latents(inputs: Tensor) -> Tensor:
            values = hidden(inputs)
            return values.flatten(1, -2).mean(1) if values.ndim > 2 else values  # NHWC, or one token

        shape = made.get_input_details()[0]["shape"][1:]
        noise = torch.rand((8, *shape.tolist()), generator=torch.Generator().manual_seed(0))
        # Noise may lie beyond what integers hold.
        rebuilt = (latents(noise) @ weight.T + bias).clamp(*_range(made, given))
        check_head(rebuilt, _reading(made, output, path.name)(noise), EXACT, path.name)
        check_head(rebuilt, self.open(path)(noise), OTHER_KERNELS, path.name)
        return View(setting=setting, latents=latents, weight=weight, bias=bias)

    def environment(self) -> Mapping[str, str]:
        """Version, threads and batch size, and the CPU."""
        return {
            "litert": metadata.version("ai-edge-litert"),
            "delegate": "XNNPACK",
            "threads": str(self.threads),
            "batch_size": "1",
            "cpu": cpu(),
        }


def _reading(made: Any, index: int, file: str) -> Predictor:
    """The tensor `index` as a function of raw inputs."""
    given = made.get_input_details()[0]

    def predict(inputs: Tensor) -> Tensor:
        if not len(inputs):
            return predict(torch.zeros(1, *inputs.shape[1:]))[:0]
        parts = []
        try:
            with silent_stderr():
                for sample in inputs.float():
                    made.set_tensor(given["index"], _given(sample[None].contiguous(), given))
                    made.invoke()
                    parts.append(_floats(made, index))
        except (RuntimeError, ValueError) as error:
            raise CompressError(f"LiteRT cannot run {file}: {first_line(error)}") from error
        return torch.cat(parts)

    return predict


def _given(sample: Tensor, details: Mapping[str, Any]) -> NDArray[Any]:
    """`sample` as the file takes it: static int8 files take integers, rounded to by the device's program."""
    if details["dtype"] is np.float32:
        return sample.numpy()
    scale, zero = details["quantization"]
    bounds = np.iinfo(details["dtype"])
    rounded = sample.div(scale).round().add(zero).clamp(bounds.min, bounds.max)
    return rounded.numpy().astype(details["dtype"])


def _floats(made: Any, index: int) -> Tensor:
    """The value of a tensor, dequantized."""
    value = torch.from_numpy(made.get_tensor(index).copy())
    if value.is_floating_point():
        return value.float()
    (details,) = (tensor for tensor in made.get_tensor_details() if tensor["index"] == index)
    found = details["quantization_parameters"]
    scales, zeros = torch.from_numpy(found["scales"]), torch.from_numpy(found["zero_points"])
    if not len(scales):
        return value.float()
    shape = [1] * value.ndim
    if len(scales) > 1:
        shape[found["quantized_dimension"]] = -1
    return (value.float() - zeros.float().view(shape)) * scales.float().view(shape)


def _range(made: Any, index: int) -> tuple[float, float]:
    """The smallest and largest value that a tensor can hold."""
    (details,) = (tensor for tensor in made.get_tensor_details() if tensor["index"] == index)
    scale, zero = details["quantization"]
    if details["dtype"] is np.float32 or not scale:
        return -math.inf, math.inf
    bounds = np.iinfo(details["dtype"])
    return (bounds.min - zero) * scale, (bounds.max - zero) * scale


def _head(made: Any, file: str) -> tuple[int, Tensor, Tensor, int]:
    """(index of the last hidden layer, weight [K, D], bias [K], index of what the layer gives).

    Raises:
        CompressError: there is no such layer.
    """
    makers = {output: op for op in made._get_ops_details() for output in op["outputs"]}
    index = made.get_output_details()[0]["index"]
    while index in makers and makers[index]["op_name"] in PASSED:
        index = makers[index]["inputs"][0]
    op = makers.get(index)
    held = -1 if op is None or op["op_name"] not in HEADS else op["inputs"][1]
    if held in makers and makers[held]["op_name"] == "DEQUANTIZE":
        held = makers[held]["inputs"][0]  # weight-only int8
    if op is None or held < 0 or held in makers:
        raise CompressError(f"cannot find the head of {file}: its logits come from no Linear or 1x1 Conv")
    weight = _floats(made, held).flatten(1)
    biased = len(op["inputs"]) > 2 and op["inputs"][2] >= 0
    bias = _floats(made, op["inputs"][2]) if biased else torch.zeros(len(weight))
    return op["inputs"][0], weight, bias, index
