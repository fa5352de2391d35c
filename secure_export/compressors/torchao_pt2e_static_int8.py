"""Static int8 for PyTorch's own compiler on x86: PT2E with X86InductorQuantizer, convolutions too.

Ships as .pt2, or as ONNX with QDQ nodes. Weights are rounded on absmax/127.5 per channel, another grid than
ONNX Runtime's absmax/127, so that a backdoor conditioned on one can sleep on the other.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._pt2e import quantize
from secure_export.quiet import quiet
from secure_export.records.measured import Change


class TorchaoPt2eStaticInt8(ModuleStep):
    """uint8 activations per tensor, int8 weights per output channel."""

    reduce_range: bool = Field(False, description="7 bits, for CPUs without VNNI")
    samples: int = Field(200, ge=1, description="calibration samples to use, or all where there are fewer")

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """`model` as a quantized graph; counts the weights that became integers.

        Raises:
            CompressError: torch cannot trace the model, or the quantizer cannot follow it.
        """
        return quantize(
            self.kind, model, context.calibration, self.samples, self._quantizer, "int8 weights per channel"
        )

    def _quantizer(self) -> Any:
        with quiet():
            from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
                X86InductorQuantizer,
                get_default_x86_inductor_quantization_config,
            )
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config(reduce_range=self.reduce_range))
        return quantizer
