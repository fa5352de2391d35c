"""Static int8 by ONNX Runtime: weights and activations on a grid fixed from the calibration split (QDQ)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.compressors._ort import quantized
from secure_export.records.measured import Change
from secure_export.records.memory import Split

if TYPE_CHECKING:
    import numpy as np

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}


class OrtStaticInt8(FileStep):
    """The defaults (uint8 activations, int8 weights) are the pair that has fast kernels on x86.

    One int8 does not stand for another: a backdoor conditioned on one weight grid can sleep on the next, so a
    sweep names both `weight_type`s and both values of `per_channel`. The scale of int8 weights is absmax/127
    (absmax/64 with 7 bits), of uint8 weights absmax/127.5 per channel and (max - min)/255 per tensor.
    """

    per_channel: bool = Field(True, description="one weight scale per output channel instead of per tensor")
    calibration: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax",
        description="how the activation range is chosen; with ONNX Runtime's own bins entropy equals minmax",
    )
    weight_type: Literal["int8", "uint8"] = Field("int8", description="int8 is symmetric, uint8 is not")
    activation_type: Literal["int8", "uint8"] = Field(
        "uint8", description="int8 for arm64; on x86 int8 activations run no faster than float"
    )
    reduce_range: bool = Field(False, description="7-bit weights, for CPUs without VNNI")
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the ONNX file `source` into `target`; counts the weight tensors that became integers.

        Raises:
            CompressError: no valid ONNX file, or ONNX Runtime cannot quantize it.
        """

        def quantize(prepared: Path, written: Path) -> None:
            quantize_static(
                prepared,
                written,
                Reader(context.calibration, self.samples),
                quant_format=QuantFormat.QDQ,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                activation_type=TYPES[self.activation_type],
                weight_type=TYPES[self.weight_type],
                calibrate_method=METHODS[self.calibration],
                calibration_providers=["CPUExecutionProvider"],
            )

        grid = "per channel" if self.per_channel else "per tensor"
        bits = " (7 bits)" if self.reduce_range else ""
        return quantized(self.kind, source, target, quantize, f"{self.weight_type} weights{bits} {grid}")


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """The first `samples` of a split in equal batches, because the histogram calibrations stack them."""

    def __init__(self, split: Split, samples: int, largest: int = 50) -> None:
        self.split, self.samples = split, min(samples, len(split))
        self.batch_size = max(size for size in range(1, largest + 1) if self.samples % size == 0)
        self.start = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch {"input": float32 [N, ...]}, or None at the end."""
        if self.start >= self.samples:
            return None
        stop = self.start + self.batch_size
        inputs = self.split.floats(slice(self.start, stop)).numpy()
        self.start = stop
        return {"input": inputs}
