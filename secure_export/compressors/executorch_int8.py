"""Static int8 for XNNPACK (PT2E with XNNPACKQuantizer), for the format `executorch`.

Weights are rounded on absmax/127 per output channel, as ONNX Runtime's int8.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._pt2e import quantize
from secure_export.quiet import quiet
from secure_export.records.measured import Change


class ExecutorchInt8(ModuleStep):
    """int8 activations per tensor, int8 weights; the same graph can be written as .pt2 or ONNX."""

    libraries: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"

    per_channel: bool = Field(True, description="one weight scale per output channel instead of per tensor")
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """`model` as a quantized graph; counts the weights that became integers.

        Raises:
            CompressError: torch cannot trace the model, or the quantizer cannot follow it.
        """
        grid = "per channel" if self.per_channel else "per tensor"
        return quantize(
            self.kind, model, context.calibration, self.samples, self._quantizer, f"int8 weights {grid}"
        )

    def _quantizer(self) -> Any:
        with quiet():
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
                XNNPACKQuantizer,
                get_symmetric_quantization_config,
            )
        return XNNPACKQuantizer().set_global(
            get_symmetric_quantization_config(is_per_channel=self.per_channel)
        )
