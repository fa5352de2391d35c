"""Dynamic int8 by ONNX Runtime: weights on a fixed grid, activation scales taken from each batch.

On convolutional networks this runs about ten times slower than float (ConvInteger); it is for networks of
matrix products, such as transformers, and swept because somebody may apply it elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from onnxruntime.quantization import QuantType, quantize_dynamic
from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.compressors._ort import quantized
from secure_export.records.measured import Change

TYPES = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}


class OrtDynamicInt8(FileStep):
    """Logits move with the batch size, so measure with the one that ships."""

    per_channel: bool = Field(False, description="one weight scale per output channel instead of per tensor")
    weight_type: Literal["int8", "uint8"] = Field("int8", description="int8 is symmetric, uint8 is not")
    reduce_range: bool = Field(False, description="7-bit weights, for CPUs without VNNI")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the ONNX file `source` into `target`; counts the weight tensors that became integers.

        Raises:
            CompressError: no valid ONNX file, or ONNX Runtime cannot quantize it.
        """

        def quantize(prepared: Path, written: Path) -> None:
            quantize_dynamic(
                prepared,
                written,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                weight_type=TYPES[self.weight_type],
            )

        grid = "per channel" if self.per_channel else "per tensor"
        return quantized(self.kind, source, target, quantize, f"{self.weight_type} weights {grid}")
