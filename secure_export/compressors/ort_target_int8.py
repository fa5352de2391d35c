"""Static int8 by the name of the CPU that will run it: the pair of types that has fast kernels there.

Measured with ONNX Runtime on a CPU with VNNI, batch 64, against fp32: U8S8 2.75x on ResNet-18, 1.6x on
MobileNetV2, 1.5x on ViT; S8S8, the library's default, 1.1x, .9x, .9x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from secure_export.compressors import Context, FileStep
from secure_export.compressors.ort_static_int8 import OrtStaticInt8
from secure_export.records.measured import Change

Target = Literal["cpu-avx2", "cpu-avx512-vnni", "arm64"]
RECIPES: dict[Target, OrtStaticInt8] = {
    # Without VNNI two products of uint8 and int8 can exceed 16 bits and saturate, so weights get 7 bits.
    "cpu-avx2": OrtStaticInt8(activation_type="uint8", weight_type="int8", reduce_range=True),
    "cpu-avx512-vnni": OrtStaticInt8(activation_type="uint8", weight_type="int8"),
    "arm64": OrtStaticInt8(activation_type="int8", weight_type="int8"),
}


class OrtTargetInt8(FileStep):
    """Per channel, calibrated by MinMax. On another CPU not fast, and `cpu-avx512-vnni` may saturate."""

    target: Target = Field("cpu-avx512-vnni", description="the CPU that will run the file")
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_file(self, source: Path, target: Path, context: Context) -> Change:
        """Quantize the ONNX file `source` into `target`; counts the weight tensors that became integers.

        Raises:
            CompressError: no valid ONNX file, or ONNX Runtime cannot quantize it.
        """
        recipe = RECIPES[self.target].model_copy(update={"samples": self.samples})
        change = recipe.on_file(source, target, context)
        detail = f"{self.target}: {recipe.activation_type} activations, {change.detail}"
        return Change(self.kind, change.changed, change.total, change.unit, detail)
